"""NEFTune: noise on the input embeddings during finetuning (arXiv 2310.05914)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from megatron_capgap.data.batch import MicroBatch, context_columns
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models.gpt import unwrap


def noise(batch: MicroBatch, hidden: int, alpha: float, seed: int) -> Tensor:
    """Noise for the whole rows of a micro-batch, fp32 `[s, b, h]`, uniform in [-1, 1] * alpha / sqrt(length * h).

    The noise of a row depends only on the seed and its sample number, and each rank that needs a part draws the whole
    row. It is therefore independent of the layout, the micro-batch and earlier draws, and is not part of a checkpoint.
    `length` is that of the token's own conversation, as if it were alone in the row.

    Args:
        batch: of packed conversations.
        hidden: hidden size of the embeddings.
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
    """Adds `noise` to the output of the input embedding in training; does nothing on ranks without the embedding.

    Args:
        chunks: this rank's model chunks.
        parallel: its layout.
        alpha: strength.
        seed: of the run.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, alpha: float, seed: int) -> None:
        self._parallel, self._alpha, self._seed = parallel, alpha, seed
        # Every schedule runs a chunk over the micro-batches in order, so a queue identifies the current one.
        self._waiting: deque[MicroBatch] = deque()
        self._embeds = parallel.is_first_stage
        if self._embeds:
            unwrap(chunks[0]).embedding.register_forward_hook(self._add)

    def start_batch(self, batches: Sequence[MicroBatch]) -> None:
        """Registers a global batch's micro-batches, before they run."""
        if self._embeds:
            assert not self._waiting, f"{len(self._waiting)} micro-batches of the last step were not embedded"
            self._waiting.extend(batches)

    def _add(self, embedding: torch.nn.Module, _: object, output: Tensor) -> Tensor:
        """The forward hook over `[s, b, h]`, or `[s/tp, b, h]` under sequence parallelism; s/cp in place of s under
        context parallelism."""
        if not embedding.training:
            return output
        added = noise(self._waiting.popleft(), output.shape[-1], self._alpha, self._seed)
        layout = self._parallel.layout
        if layout.context > 1:
            added = added[context_columns(len(added), self._parallel.cp_rank, layout.context, added.device)]
        if layout.sequence:
            added = added.chunk(layout.tensor)[self._parallel.tp_rank]
        return output + added.to(output.dtype)
