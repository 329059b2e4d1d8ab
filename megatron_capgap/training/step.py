"""One optimizer step: pipeline schedule, division by the global number of tokens, check of loss and norm, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.devices.base import Span
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.losses import Loss
from megatron_capgap.models import pipeline_schedule
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.training import param_sync
from megatron_capgap.training.optimizer import OptimizerState

LossFunction = Callable[[Tensor, Tensor, MicroBatch], Loss]
"""(final hidden states `[s/tp or s, b, h]`, LM head shard `[v/tp, h]`, micro-batch) -> sums over its valid tokens."""


class BadBatch(UserError):
    """Loss or gradient norm of a global batch is not usable; weights and optimizer are unchanged. Raised on all ranks.

    Args:
        message: one line for the user.
        what: short description of the problem.
        samples: ids of the suspect samples.
    """

    def __init__(self, message: str, what: str, samples: list[int]) -> None:
        super().__init__(message)
        self.what = what
        self.samples = samples


@dataclass(frozen=True)
class StepResult:
    """Result of one step; all numbers are global and the same on all ranks."""

    loss: float
    """Loss, mean over valid tokens."""
    loss_parts: dict[str, float]
    """Parts of the loss, mean over valid tokens."""
    tokens: int
    """Valid tokens in the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of the update."""


class Exchange(Protocol):
    """What the ranks exchange once per step besides the losses; see `rank_exchange`."""

    def sums(self) -> Tensor:
        """Numbers summed over all ranks, fp64 `[k]`. Collective."""

    def receive(self, numbers: Sequence[float]) -> None:
        """Takes them in host memory."""


def train_step(
    chunks: Sequence[DistributedDataParallel],
    parallel: ParallelContext,
    optimizer: OptimizerState,
    batches: Sequence[MicroBatch],
    loss: LossFunction,
    matching_loss: Callable[[], Loss] | None = None,
    *,
    report: Sequence[str],
    exchange: Exchange | None = None,
    before_reduction: Callable[[], None] = lambda: None,
    span: Span = nullcontext,
    step: int,
    clip_norm: float,
    max_norm: float | None = None,
) -> StepResult:
    """Trains on one global batch. Collective.

    The process waits for the device once: for the losses, the norm and the numbers of `exchange`, packed in one tensor.

    Args:
        chunks: the student's chunks on this rank.
        parallel: its layout and process groups.
        optimizer: its optimizer and schedule.
        batches: this data-parallel rank's micro-batches of the global batch.
        loss: the loss as a function of the final hidden states.
        matching_loss: returns, after all micro-batches, the matching loss that this stage's layers have added to the
            backward pass, summed over this rank's tokens; collective over the tensor-parallel ranks.
        report: names of the parts of the loss, on any stage.
        exchange: called between the reduction of gradients and the update; None exchanges nothing.
        before_reduction: called after the last backward pass; on a device, its work hides the reduction of gradients.
        span: names ranges of the step in profiles.
        step: its number, for messages.
        clip_norm: gradients with a larger norm are scaled down to it; 0 disables clipping.
        max_norm: a batch with a larger gradient norm is bad; None accepts every finite norm.

    Raises:
        BadBatch: loss or gradient norm is not finite, or the norm is too large; weights, optimizer and schedule are
            unchanged.
    """
    _prepare(chunks, optimizer)
    sums = _StepSums(chunks, parallel, loss, matching_loss, report, before_reduction, span)
    get_model_config(chunks[0]).finalize_model_grads_func = sums.reduce_gradients
    micro_batch, sequence_length = batches[0].tokens.shape
    pipeline_schedule.run(
        chunks, parallel, batches, sums.last_stage, forward_only=False, shape=(sequence_length, micro_batch)
    )
    get_model_config(chunks[0]).finalize_model_grads_func = None  # it holds the batch
    optimizer.optimizer.prepare_grads()
    count = len(sums.total)
    packed = [sums.total, optimizer.grad_norm().double()[None], *([exchange.sums()] if exchange else [])]
    numbers = torch.cat(packed).tolist()  # waits for the device
    (loss_mean, parts, tokens), grad_norm = _means(numbers[:count], report), numbers[count]
    if exchange:
        exchange.receive(numbers[count + 1 :])
    if not loss_mean - loss_mean == 0.0:  # true for NaN and infinities
        raise _bad_batch(f"loss {loss_mean} is not finite", step, sums.suspect(batches))
    _check_norm(grad_norm, max_norm, step, batches)
    return StepResult(loss_mean, parts, tokens, grad_norm, _update(optimizer, grad_norm, clip_norm, span))


class _StepSums:
    """The sums of one global batch, and the functions that Megatron's schedule calls to compute them.

    Args:
        chunks, parallel, loss, matching_loss, report, before_reduction, span: as `train_step` takes them.
    """

    total: Tensor
    """(loss, tokens, each part of the loss), summed over all ranks, fp64; set by `reduce_gradients`."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        parallel: ParallelContext,
        loss: LossFunction,
        matching_loss: Callable[[], Loss] | None,
        report: Sequence[str],
        before_reduction: Callable[[], None],
        span: Span,
    ) -> None:
        self._span = span
        self._chunks, self._parallel, self._report = chunks, parallel, report
        self._loss, self._matching_loss, self._before_reduction = loss, matching_loss, before_reduction
        self._losses: list[tuple[Loss, MicroBatch]] = []
        self._of_layers: list[Loss] = []

    def last_stage(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, None]:
        """The loss of a micro-batch."""
        with self._span("loss"):
            out = self._loss(hidden, param_sync.lm_head(self._chunks[-1]), batch)
        self._losses.append((Loss(out.loss_sum.detach(), out.num_tokens, out.report), batch))
        return out.loss_sum, out.num_tokens.to(torch.int), None

    def reduce_gradients(self, model: list[DistributedDataParallel], num_tokens: Tensor, **options: Any) -> None:
        """Called after the last backward pass: reduces gradients and losses, divides gradients by the number of tokens.

        Megatron divides in the same way, but asks the device for the number of tokens, once per chunk.
        """
        if self._matching_loss is not None:
            self._of_layers.append(self._matching_loss())
        self._before_reduction()
        with self._span("gradient reduction"):
            finalize_model_grads(model, None, **options)
            losses = [*(out for out, _ in self._losses), *self._of_layers]
            self.total = _sum_losses(losses, self._report, self._parallel)
            scale = 1.0 / self.total[1].to(torch.int).clamp(min=1)
            for chunk in model:
                chunk.scale_gradients(scale)

    def suspect(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """The micro-batches whose loss is not finite; all `batches` if the layers' loss is not."""
        found = [batch for out, batch in self._losses if not _finite(out)]
        return found if all(map(_finite, self._of_layers)) else batches


def _prepare(chunks: Sequence[DistributedDataParallel], optimizer: OptimizerState) -> None:
    """Sets all gradients to zero, and waits for the weights that hooks of other modules read."""
    optimizer.optimizer.zero_grad()
    for chunk in chunks:
        chunk.zero_grad_buffer()
        param_sync.wait_for(chunk, unwrap(chunk).projections.parameters())


def _update(optimizer: OptimizerState, grad_norm: float, clip_norm: float, span: Span) -> float:
    """Clips the gradients and updates the weights; returns the learning rate of the update."""
    with span("optimizer"):
        if clip_norm > 0.0:
            for part in optimizer.optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip_norm, total_norm=grad_norm)
        lr: float = next(group["lr"] for group in optimizer.optimizer.param_groups if group.get("default_config", True))
        optimizer.optimizer.step_with_ready_grads()
        optimizer.lr_scheduler.step(1)  # after the update: the first update uses the schedule's first rate
        return lr


def reduce_losses(
    losses: Sequence[Loss], report: Sequence[str], parallel: ParallelContext
) -> tuple[float, dict[str, float], int]:
    """Means over all valid tokens of all ranks. Collective; waits for the device.

    Args:
        losses: sums on this rank, replicated over tensor-parallel ranks; each token is counted on one stage.
        report: names of their report entries, the same on all ranks.
        parallel: the layout.

    Returns:
        (mean loss, mean of each report entry, number of tokens), the same on every rank.
    """
    return _means(_sum_losses(losses, report, parallel).tolist(), report)


def _sum_losses(losses: Sequence[Loss], report: Sequence[str], parallel: ParallelContext) -> Tensor:
    """(loss, tokens, each report entry), fp64, summed over all ranks; see `reduce_losses`. Collective."""
    device = losses[0].loss_sum.device if losses else torch.cuda.current_device()
    sums = torch.zeros(2 + len(report), dtype=torch.float64, device=device)
    nothing = torch.zeros((), device=device)
    for out in losses:
        assert set(out.report) <= set(report), f"{sorted(out.report)} are not all among {report}"
        numbers = (out.loss_sum, out.num_tokens, *(out.report.get(name, nothing) for name in report))
        sums += torch.stack([number.double() for number in numbers])
    return parallel.all_reduce_over_dp_and_pp(sums)


def _means(sums: Sequence[float], report: Sequence[str]) -> tuple[float, dict[str, float], int]:
    total, tokens, *parts = sums
    count = max(tokens, 1.0)
    return total / count, {name: part / count for name, part in zip(report, parts, strict=True)}, int(tokens)


def _check_norm(norm: float, max_norm: float | None, step: int, batches: Sequence[MicroBatch]) -> None:
    """Raises BadBatch if the global gradient norm is not finite or too large; then collective."""
    if not norm - norm == 0.0:
        raise _bad_batch(f"gradient norm {norm} is not finite", step, batches)
    if max_norm is not None and norm > max_norm:
        raise _bad_batch(f"gradient norm {norm:.6g} is above train.max_grad_norm {max_norm:g}", step, batches)


def _finite(out: Loss) -> bool:
    return bool(torch.isfinite(out.loss_sum))


def _bad_batch(what: str, step: int, mine: Sequence[MicroBatch]) -> BadBatch:
    """Builds the error with the ids of the suspect samples, gathered from all ranks. Collective."""
    everywhere: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, [sample for batch in mine for sample in batch.sample_ids])
    samples = sorted({sample for ids in everywhere for sample in ids})
    message = (
        f"step {step}: {what}; weights and optimizer are as after step {step - 1}; "
        f"suspect samples {samples}; inspect them, lower optimizer.lr, or restart from the last checkpoint"
    )
    return BadBatch(message, what, samples)
