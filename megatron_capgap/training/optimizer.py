"""Megatron's distributed AdamW and its schedule, from the configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megatron_capgap.config.schema import Config
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.layout import Grid


def wrap(chunks: list[torch.nn.Module], grid: Grid) -> list[DistributedDataParallel]:
    """Puts model chunks into Megatron's DistributedDataParallel, whose optimizer state is cut over data-parallel ranks."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        average_in_collective=False,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        config = get_model_config(chunk)
        wrapped.append(
            DistributedDataParallel(
                config=config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0, pg_collection=grid.groups
            )
        )
        config.finalize_model_grads_func = finalize_model_grads
    return wrapped


@dataclass(frozen=True)
class Optimization:
    """The optimizer and its schedule; both have a state dict."""

    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


def build(chunks: list[DistributedDataParallel], config: Config, device: Device) -> Optimization:
    """Makes the optimizer over all chunks of this rank. Collective.

    Args:
        chunks: wrapped by `wrap`.
        config: optimizer, train.steps and precision are read.
        device: switches on its fused kernels.
    """
    wanted = config.optimizer
    bf16 = config.precision.compute == "bf16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=wanted.lr,
        min_lr=wanted.min_lr,
        weight_decay=wanted.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=wanted.betas[0],
        adam_beta2=wanted.betas[1],
        adam_eps=wanted.epsilon,
        clip_grad=wanted.clip_norm,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, chunks)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        device.tune_optimizer(part.optimizer)
    assert config.train.steps is not None
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=wanted.lr,
        min_lr=wanted.min_lr,
        lr_warmup_steps=min(int(wanted.warmup_fraction * config.train.steps), config.train.steps - 1),
        lr_decay_steps=config.train.steps,
        lr_decay_style=wanted.schedule,
        start_wd=wanted.weight_decay,
        end_wd=wanted.weight_decay,
        wd_incr_steps=config.train.steps,
        wd_incr_style="constant",
    )
    return Optimization(optimizer, schedule)
