"""Stage adapt: next-token training from random weights or from a checkpoint."""

from __future__ import annotations

from megatron_capgap.devices import Device
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.distributed.signals import exit_code
from megatron_capgap.stages import context
from megatron_capgap.stages.plan import RunPlan
from megatron_capgap.training.loop import train


def run(plan: RunPlan, environment: Environment, device: Device) -> int:
    """Trains; returns the exit code."""
    with context.stage_context(plan, environment, device) as ctx:
        return exit_code(train(context.language_model_run(ctx)))
