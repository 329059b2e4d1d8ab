"""Stage finetune: trains on the assistant turns of conversations, with or without a teacher."""

from __future__ import annotations

from megatron_capgap.devices import Device
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.distributed.signals import exit_code
from megatron_capgap.stages import context, distill
from megatron_capgap.stages.plan import DistillationPlan, RunPlan
from megatron_capgap.training.loop import train


def run(plan: RunPlan, environment: Environment, device: Device) -> int:
    """Finetunes; returns the exit code."""
    if isinstance(plan, DistillationPlan):
        with context.stage_context(plan, environment, device) as with_teacher:
            return exit_code(train(distill.colocated_run(with_teacher)))
    with context.stage_context(plan, environment, device) as ctx:
        return exit_code(train(context.language_model_run(ctx)))
