"""Loss on held-out text: the same number in every layout, per token and per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_capgap.data.batch import MicroBatch, Samples, micro_batches
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.losses import Loss, language_model_loss
from megatron_capgap.models import schedule
from megatron_capgap.models.fp8_scales import DelayedScales
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.training.step import reduce_losses


@dataclass(frozen=True)
class Evaluation:
    """A model on a held-out set."""

    loss: float
    """Cross-entropy in nats a token."""
    bits_per_byte: float
    """Bits that the model needs for one byte of the text; comparable between tokenizers."""
    tokens: int
    """Tokens that were predicted."""
    samples: int
    """Sequences that were read."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def entry(self, step: int) -> dict[str, float]:
        """Its line in metrics.jsonl."""
        return {
            "step": step,
            "valid_loss": self.loss,
            "valid_perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "valid_tokens": self.tokens,
        }


def evaluate(
    chunks: Sequence[torch.nn.Module],
    parallel: ParallelContext,
    sequence: Samples,
    *,
    vocab_size: int,
    byte_lengths: Tensor,
    micro_batch: int,
    global_batch: int,
    batches: int | None,
    device: torch.device,
    halted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Runs the model forward over held-out samples, each exactly once. Collective.

    Leaves the model in training mode, with the FP8 scales that it had.

    Args:
        chunks: this rank's model chunks.
        parallel: their layout.
        sequence: held-out samples.
        vocab_size: columns of the LM head beyond it are padding.
        byte_lengths: UTF-8 bytes of each token, float64 `[vocab_size]`.
        micro_batch: sequences in one forward pass of one rank.
        global_batch: sequences in one pass of all ranks.
        batches: global batches to read; None reads everything.
        device: where tensors live.
        halted: asked before every batch whether to give up, on all ranks alike. Collective.

    Returns:
        The same on all ranks; None where it was given up.
    """
    samples = len(sequence) if batches is None else min(len(sequence), batches * global_batch)
    losses: list[Loss] = []
    last_stage = _summing(losses, chunks[-1], parallel, vocab_size, byte_lengths.to(device))
    given_up = False
    with _measuring(chunks):
        for start in range(0, samples, global_batch):
            if given_up := halted():
                break
            wanted = range(start, start + global_batch)
            mine = list(
                micro_batches(sequence, wanted, micro_batch, parallel.dp_rank, parallel.dp_size, device, limit=samples)
            )
            shape = (mine[0].tokens.shape[1], micro_batch)
            schedule.run(chunks, parallel, mine, last_stage, forward_only=True, shape=shape)
    if given_up:
        return None
    loss, report, tokens = reduce_losses(losses, parallel)
    bits = loss / math.log(2.0) / report["bytes"] if report.get("bytes") else float("nan")
    return Evaluation(loss, bits, tokens, samples)


def _summing(
    losses: list[Loss], last_chunk: torch.nn.Module, parallel: ParallelContext, vocab_size: int, lengths: Tensor
) -> schedule.LastStage:
    """What the last pipeline stage does with its hidden states: cross-entropy and bytes of a micro-batch, added to
    `losses`."""

    def last_stage(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, None]:
        labels, mask = batch.flat()
        out = language_model_loss(
            hidden.flatten(0, 1),
            unwrap(last_chunk).lm_head(),
            labels,
            mask,
            vocab_size=vocab_size,
            group=parallel.groups.tp,
            sequence_parallel=parallel.layout.sequence,
        )
        count = (lengths[labels.clamp(0, vocab_size - 1)] * mask).sum()
        losses.append(Loss(out.loss_sum, out.num_tokens, {"bytes": count}))
        return out.loss_sum, out.num_tokens.to(torch.int), None

    return last_stage


@contextmanager
def _measuring(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode and no gradients, then training mode and the FP8 scales from before."""
    scales = DelayedScales(chunks)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in chunks:
        chunk.train()
    scales.restore()
