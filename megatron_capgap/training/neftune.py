"""NEFTune: noise on the input embeddings while a model is finetuned (arXiv 2310.05914)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models.gpt import unwrap


def noise(batch: MicroBatch, hidden: int, alpha: float, seed: int) -> Tensor:
    """Noise for the whole rows of a micro-batch, fp32 `[s, b, h]`, uniform in [-1, 1] * alpha / sqrt(length * h).

    A row's is drawn from the seed and its sample's number alone, whole on every rank that needs a part of it: it does
    not depend on the layout, on the micro-batch or on what was drawn before, and a restart need not remember it. The
    length is that of the token's own conversation, as if it had the row for itself.

    Args:
        batch: of packed conversations.
        hidden: width of the embeddings.
        alpha: strength.
        seed: of the run.
    """
    device, length = batch.tokens.device, batch.tokens.shape[1]
    rows = []
    for sample in batch.sample_ids:
        digest = blake2b(b"%d" % sample, key=b"%d neftune" % seed, digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
        rows.append(torch.rand(length, hidden, generator=generator, device=device))
    scale = alpha / (batch.lengths() * hidden).float().sqrt()  # [b, s]
    return (2.0 * torch.stack(rows, dim=1) - 1.0) * scale.t().unsqueeze(-1)


class Neftune:
    """Adds `noise` to what the input embedding gives in training; on ranks without it, nothing.

    Args:
        chunks: the model's on this rank.
        parallel: its layout.
        alpha: strength.
        seed: of the run.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, alpha: float, seed: int) -> None:
        self._parallel, self._alpha, self._seed = parallel, alpha, seed
        # Every schedule takes a chunk through the micro-batches in their order: a queue tells which of them it is.
        self._waiting: deque[MicroBatch] = deque()
        self._embeds = parallel.is_first_stage
        if self._embeds:
            unwrap(chunks[0]).embedding.register_forward_hook(self._add)

    def start_batch(self, batches: Sequence[MicroBatch]) -> None:
        """Takes note of a global batch's micro-batches, before they run."""
        if self._embeds:
            assert not self._waiting, f"{len(self._waiting)} micro-batches of the last step were not embedded"
            self._waiting.extend(batches)

    def _add(self, embedding: torch.nn.Module, _: object, output: Tensor) -> Tensor:
        """The forward hook over `[s, b, h]`, or `[s/tp, b, h]` under sequence parallelism."""
        if not embedding.training:
            return output
        added = noise(self._waiting.popleft(), output.shape[-1], self._alpha, self._seed)
        layout = self._parallel.layout
        if layout.sequence:
            added = added.chunk(layout.tensor)[self._parallel.tp_rank]
        return output + added.to(output.dtype)
