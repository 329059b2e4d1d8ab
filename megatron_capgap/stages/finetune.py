"""finetune: a model learns the assistant's words of conversations, by itself or from a teacher."""

from __future__ import annotations

from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.devices import Device
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.stages import context, distill
from megatron_capgap.training.loop import train


def run(loaded: LoadedConfig, environment: Environment, device: Device) -> int:
    """Finetunes; returns the exit code."""
    with context.stage_context(loaded, "finetune", environment, device) as ctx:
        if ctx.config.teacher is None:
            train(context.language_model_run(ctx))
        else:
            train(distill.colocated_run(ctx))
    return 0
