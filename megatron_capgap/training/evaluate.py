"""Evaluation: loss on held-out text, per token and per byte, independent of the layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_capgap.data.batch import MicroBatch, TokenDataset, micro_batches
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.losses import Loss, language_model_loss
from megatron_capgap.models import pipeline_schedule
from megatron_capgap.models.fp8_scales import DelayedScales
from megatron_capgap.training import param_sync
from megatron_capgap.training.step import reduce_losses


@dataclass(frozen=True)
class Evaluation:
    """Result of evaluating a model on a held-out set."""

    loss: float
    """Cross-entropy in nats per token."""
    bits_per_byte: float
    """Cross-entropy in bits per byte of the text; comparable between tokenizers."""
    tokens: int
    """Number of predicted tokens."""
    samples: int
    """Number of sequences read."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def entry(self, step: int) -> dict[str, float]:
        """The entry for metrics.jsonl."""
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
    sequence: TokenDataset,
    *,
    vocab_size: int,
    byte_lengths: Tensor,
    micro_batch: int,
    global_batch: int,
    batches: int | None,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Runs the model forward over held-out samples, each exactly once. Collective.

    Leaves the model in training mode, with its FP8 scales unchanged.

    Args:
        chunks: this rank's model chunks.
        parallel: their layout.
        sequence: held-out samples.
        vocab_size: number of real columns of the LM head; the rest is padding.
        byte_lengths: UTF-8 bytes of each token, float64 `[vocab_size]`.
        micro_batch: sequences in one forward pass of one rank.
        global_batch: sequences in one pass of all ranks.
        batches: global batches to read; None reads all.
        device: device of the tensors.
        should_stop: called before every batch; True on all ranks ends the evaluation. Collective.

    Returns:
        The result, the same on all ranks; None if `should_stop` ended it.
    """
    samples = len(sequence) if batches is None else min(len(sequence), batches * global_batch)
    losses: list[Loss] = []
    last_stage = _make_loss_func(losses, chunks[-1], parallel, vocab_size, byte_lengths.to(device))
    stopped = False
    with _eval_mode(chunks):
        for start in range(0, samples, global_batch):
            if stopped := should_stop():
                break
            sample_ids = range(start, start + global_batch)
            mine = list(
                micro_batches(
                    sequence, sample_ids, micro_batch, parallel.dp_rank, parallel.dp_size, device, limit=samples
                )
            )
            shape = (mine[0].tokens.shape[1], micro_batch)
            pipeline_schedule.run(chunks, parallel, mine, last_stage, forward_only=True, shape=shape)
    if stopped:
        return None
    loss, report, tokens = reduce_losses(losses, ("bytes",), parallel)
    bits = loss / math.log(2.0) / report["bytes"] if report.get("bytes") else float("nan")
    return Evaluation(loss, bits, tokens, samples)


def _make_loss_func(
    losses: list[Loss], last_chunk: torch.nn.Module, parallel: ParallelContext, vocab_size: int, lengths: Tensor
) -> pipeline_schedule.LastStage:
    """The last pipeline stage's function: appends cross-entropy and byte sums of a micro-batch to `losses`."""

    def last_stage(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, None]:
        labels, mask = batch.flat()
        out = language_model_loss(
            hidden.flatten(0, 1),
            param_sync.lm_head(last_chunk),
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
def _eval_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients; on exit training mode and the previous FP8 scales."""
    scales = DelayedScales(chunks)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in chunks:
        chunk.train()
    scales.restore()
