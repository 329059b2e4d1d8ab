"""Megatron's distributed AdamW optimizer and learning-rate schedule, built from the configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_capgap.config import derived, training
from megatron_capgap.config.schema import Config, Precision
from megatron_capgap.devices import Device
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.runtime import releases


def wrap(
    chunks: list[torch.nn.Module], parallel: ParallelContext, precision: Precision, *, overlap: bool
) -> list[DistributedDataParallel]:
    """Wraps model chunks in Megatron's DistributedDataParallel; optimizer state is sharded over data- and
    context-parallel ranks.

    With `overlap`, gradients are reduced bucket by bucket while the last backward pass of a step runs, and weights are
    gathered while the next forward pass runs: see `training.param_sync` for who must wait for them.
    """
    overlap = overlap and parallel.dp_size * parallel.layout.context > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        average_in_collective=False,
        fp8_param_gather=precision.fp8 is not None and precision.fp8.param_gather,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        config = get_model_config(chunk)
        wrapped.append(
            DistributedDataParallel(
                config=config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0, pg_collection=parallel.groups
            )
        )
    if overlap:  # gradients of all micro-batches but the last are only added up
        no_sync = [chunk.no_sync for chunk in wrapped]
        get_model_config(wrapped[0]).no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


# The only optimizer format of Megatron-Core that a run with another data-parallel size can load; gathered on the rank
# that writes it, not on every data-parallel rank.
_SHARDING_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


_FROM_CONFIG = ("max_lr", "min_lr", "betas", "eps", "fused", "foreach")


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer and its learning-rate schedule."""

    optimizer: MegatronOptimizer
    lr_scheduler: OptimizerParamScheduler

    def grad_norm(self) -> Tensor:
        """Global norm of the reduced gradients, fp32, on the device. Collective.

        Summed in fp64 and rounded to fp32 once, so that equal gradients have the same norm to the last digit in every
        pipeline layout. Megatron's own norm is rounded on every stage. Clipping multiplies all gradients by the norm,
        so a difference in its last digit changes the last digit of many weights, and some of their 8-bit casts.
        """
        parts = self.optimizer.chained_optimizers
        squares = sum_of_squares([grad for part in parts for grad in releases.grads_for_norm(part)])
        dist.all_reduce(squares, group=self.optimizer.get_grad_stats_parallel_group())
        return squares.sqrt().float()

    def sharded_state(self, model: ShardedStateDict, *, loading: bool) -> ShardedStateDict:
        """The optimizer's sharded state, with layout-independent keys. Collective.

        For a save, Megatron's gloo groups, used by nothing else, gather it on the first data-parallel rank.

        Args:
            model: the model's sharded state, which gives the parameters' names and sharding.
            loading: whether the state is the target of a load.
        """
        with releases.bucket_padding_kept(self.optimizer.chained_optimizers):
            return self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_SHARDING_METADATA)

    def copied(self) -> OptimizerState:
        """A copy in host memory of the state that `sharded_state` reads; usable for that only."""
        optimizer = copy.copy(self.optimizer)
        optimizer.chained_optimizers = [_copied(part) for part in self.optimizer.chained_optimizers]
        return replace(self, optimizer=optimizer)

    def load(self, state: dict[str, Any], steps: int, updates: int) -> None:
        """Sets the optimizer's state from a checkpoint.

        Args:
            state: the filled state of `sharded_state`.
            steps: schedule steps done.
            updates: those among them that changed the weights.
        """
        # The current configuration applies, not the one the checkpoint was written with.
        current = [{key: group[key] for key in _FROM_CONFIG if key in group} for group in self.optimizer.param_groups]
        for group in state["optimizer"]["param_groups"]:
            # Megatron-Core 0.19 identifies a saved group by its current rates, older releases by its kind only.
            group.update(
                next(
                    now
                    for now, own in zip(current, self.optimizer.param_groups, strict=True)
                    if _same_group(group, own)
                )
            )
        inner = list(_torch_optimizers(self.optimizer))
        if not inner:
            self.optimizer.load_state_dict(state)
        for part in inner:
            _load_torch(self.optimizer, part, state, updates)
        for group, values in zip(self.optimizer.param_groups, current, strict=True):
            group.update(values)
        self.lr_scheduler.num_steps = 0
        self.lr_scheduler.step(steps)


def _same_group(group: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two groups are of the same kind: parameters with or without weight decay."""
    return all(
        group.get(key) == other.get(key) for key in ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
    )


# Number of values whose squares are summed in fp32. The CPU kernel sums a whole tensor in fp32 with few accumulators,
# which loses 0.2 % of the norm of 30 million normal values.
_BLOCK_SIZE = 4096


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares of all values, fp64 scalar: blocks of a tensor are summed in fp32, the blocks' sums in fp64."""
    norms = []
    for tensor in tensors:
        values = tensor.detach().view(-1)
        whole = values.numel() // _BLOCK_SIZE * _BLOCK_SIZE
        norms += [torch.linalg.vector_norm(values[:whole].view(-1, _BLOCK_SIZE), dim=1)]
        norms += [torch.linalg.vector_norm(values[whole:]).view(1)]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    return torch.cat(norms).double().square().sum()


def _copied(part: MegatronOptimizer) -> MegatronOptimizer:
    """A distributed optimizer with the original's ranges and groups, and copies of its current tensors."""
    inner, found = part.optimizer, copy.copy(part)
    # Not copy.copy: it would not copy all attributes of Transformer Engine's optimizer.
    found.optimizer = object.__new__(type(inner))
    vars(found.optimizer).update(vars(inner))
    shadows = {p: _in_host_memory(p) for group in inner.param_groups for p in group["params"]}
    found.optimizer.state = {shadows[p]: {k: _in_host_memory(v) for k, v in s.items()} for p, s in inner.state.items()}
    found.optimizer.param_groups = [
        {**group, "params": [shadows[p] for p in group["params"]]} for group in inner.param_groups
    ]
    return found


def _in_host_memory(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _torch_optimizers(optimizer: MegatronOptimizer) -> Iterator[torch.optim.AdamW]:
    """The torch optimizers that Megatron falls back to without Transformer Engine and Apex."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part.optimizer


def _load_torch(optimizer: MegatronOptimizer, inner: torch.optim.AdamW, state: dict[str, Any], updates: int) -> None:
    """Loads a distributed optimizer that wraps torch's AdamW.

    Megatron's own `load_state_dict` fails on torch's step counters (it looks for them among the sharded tensors), and
    would make all parameters share one counter that each of them increments. The counters are therefore set separately.
    """
    (part,) = optimizer.chained_optimizers
    groups = {key: value for key, value in state.items() if not key.startswith("param_state")}
    part.load_state_dict(groups)
    for entry in inner.state.values():
        del entry["step"]
    part.load_parameter_state_from_fully_reshardable(state["param_state"])
    for parameter, entry in inner.state.items():
        entry["step"] = torch.tensor(float(updates), device=parameter.device)  # where the fused kernel needs it


def _allocate(optimizer: torch.optim.AdamW) -> None:
    """Allocates Adam's state before the first step: Megatron can load a checkpoint only into existing state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def build(chunks: list[DistributedDataParallel], config: Config, device: Device) -> OptimizerState:
    """Builds the optimizer over all chunks of this rank. Collective.

    Args:
        chunks: wrapped by `wrap`.
        config: its optimizer, train.steps and precision are used.
        device: decides whether fused kernels are used.
    """
    section = config.optimizer
    precision = derived.student_precision(config)
    bf16 = precision.compute == "bf16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_eps=section.epsilon,
        clip_grad=section.clip_norm,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        fp8_recipe=precision.fp8.recipe if precision.fp8 else None,
        use_distributed_optimizer=True,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, chunks)
    for inner in _torch_optimizers(optimizer):
        device.tune_optimizer(inner)
        _allocate(inner)
    assert config.train.steps is not None
    return OptimizerState(optimizer, build_lr_scheduler(optimizer, section, config.train.steps))


def build_lr_scheduler(
    optimizer: MegatronOptimizer, section: training.OptimizerConfig, steps: int
) -> OptimizerParamScheduler:
    """The learning-rate schedule, as in transformers.

    Args:
        optimizer: whose learning rate it sets.
        section: the configuration's section `optimizer`.
        steps: updates of the whole run.
    """
    warmup = warmup_steps(section.warmup_fraction, steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(steps, warmup + 1),  # Megatron requires a decay phase; the run ends before it
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )


def warmup_steps(fraction: float, steps: int) -> int:
    """Number of warm-up updates, rounded up as in transformers; 0 for a run of one update, whose rate would be 0."""
    return math.ceil(steps * fraction) if steps > 1 else 0
