"""One optimizer step: pipeline schedule, division by the global number of tokens, check of loss and norm, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.batch import MicroBatch
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


def train_step(
    chunks: Sequence[DistributedDataParallel],
    parallel: ParallelContext,
    optimizer: OptimizerState,
    batches: Sequence[MicroBatch],
    loss: LossFunction,
    matching_loss: Callable[[], Loss] | None = None,
    *,
    step: int,
    clip_norm: float,
    max_norm: float | None = None,
) -> StepResult:
    """Trains on one global batch. Collective.

    Args:
        chunks: the student's chunks on this rank.
        parallel: its layout and process groups.
        optimizer: its optimizer and schedule.
        batches: this data-parallel rank's micro-batches of the global batch.
        loss: the loss as a function of the final hidden states.
        matching_loss: returns, after all micro-batches, the matching loss that this stage's layers have added to the
            backward pass, summed over this rank's tokens; collective over the tensor-parallel ranks.
        step: its number, for messages.
        clip_norm: gradients with a larger norm are scaled down to it; 0 disables clipping.
        max_norm: a batch with a larger gradient norm is bad; None accepts every finite norm.

    Raises:
        BadBatch: loss or gradient norm is not finite, or the norm is too large; weights, optimizer and schedule are
            unchanged.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.optimizer.zero_grad()
    losses: list[tuple[Loss, MicroBatch]] = []
    for chunk in chunks:  # read by hooks of other modules
        param_sync.wait_for(chunk, unwrap(chunk).projections.parameters())

    def last_stage(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, None]:
        out = loss(hidden, param_sync.lm_head(chunks[-1]), batch)
        losses.append((Loss(out.loss_sum.detach(), out.num_tokens, out.report), batch))
        return out.loss_sum, out.num_tokens.to(torch.int), None

    micro_batch, sequence_length = batches[0].tokens.shape
    pipeline_schedule.run(
        chunks, parallel, batches, last_stage, forward_only=False, shape=(sequence_length, micro_batch)
    )
    of_layers = [] if matching_loss is None else [matching_loss()]
    loss_mean, report, tokens = reduce_losses([*(out for out, _ in losses), *of_layers], parallel)
    if not loss_mean - loss_mean == 0.0:  # true for NaN and infinities
        suspect = [batch for out, batch in losses if not _finite(out)]
        what = f"loss {loss_mean} is not finite"
        raise _bad_batch(what, step, suspect if all(map(_finite, of_layers)) else batches)
    grad_norm = _clip(optimizer, clip_norm, max_norm, step, batches)
    lr = next(group["lr"] for group in optimizer.optimizer.param_groups if group.get("default_config", True))
    optimizer.optimizer.step_with_ready_grads()
    optimizer.lr_scheduler.step(1)  # after the update: the first update uses the schedule's first rate
    return StepResult(loss_mean, report, tokens, grad_norm, lr)


def reduce_losses(losses: Sequence[Loss], parallel: ParallelContext) -> tuple[float, dict[str, float], int]:
    """Means over all valid tokens of all ranks. Collective.

    Args:
        losses: sums on this rank, replicated over tensor-parallel ranks; each token is counted on one stage.

    Returns:
        (mean loss, mean of each report entry, number of tokens), the same on every rank.
    """
    names = sorted({name for out in losses for name in out.report})
    if parallel.layout.pipeline > 1:
        of_stages: list[list[str]] = [[]] * parallel.layout.pipeline
        dist.all_gather_object(of_stages, names, group=parallel.groups.pp)
        names = sorted({name for of_stage in of_stages for name in of_stage})
    device = losses[0].loss_sum.device if losses else torch.cuda.current_device()
    sums = torch.zeros(2 + len(names), dtype=torch.float64, device=device)
    nothing = torch.zeros((), device=device)
    for out in losses:
        numbers = (out.loss_sum, out.num_tokens, *(out.report.get(name, nothing) for name in names))
        sums += torch.stack([number.double() for number in numbers])
    total, tokens, *parts = parallel.all_reduce_over_dp_and_pp(sums).tolist()
    count = max(tokens, 1.0)
    return total / count, {name: part / count for name, part in zip(names, parts, strict=True)}, int(tokens)


def _clip(
    optimizer: OptimizerState, clip_norm: float, max_norm: float | None, step: int, batches: Sequence[MicroBatch]
) -> float:
    """Computes the global gradient norm, raises BadBatch for a bad one, clips gradients to `clip_norm`. Collective."""
    inner = optimizer.optimizer
    inner.prepare_grads()
    norm = optimizer.grad_norm()
    if not norm - norm == 0.0:
        raise _bad_batch(f"gradient norm {norm} is not finite", step, batches)
    if max_norm is not None and norm > max_norm:
        raise _bad_batch(f"gradient norm {norm:.6g} is above train.max_grad_norm {max_norm:g}", step, batches)
    if clip_norm > 0.0:
        for part in inner.chained_optimizers:
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip_norm, total_norm=norm)
    return norm


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
