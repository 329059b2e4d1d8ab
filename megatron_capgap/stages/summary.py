"""What a run says of itself at its start: kernels, models, precision, ranks."""

from __future__ import annotations

from megatron_capgap.config import derived
from megatron_capgap.config.schema import Layout
from megatron_capgap.devices import Device
from megatron_capgap.models import size
from megatron_capgap.runtime.logging import RunLogger, count
from megatron_capgap.stages import check
from megatron_capgap.stages.plan import RunPlan


def log_summary(log: RunLogger, plan: RunPlan, device: Device) -> None:
    """Logs the summary at the start of a run."""
    log.table(*device.component_table())
    for name, shape in (("student", plan.student), ("teacher", plan.teacher)):
        if shape is not None:
            total, inner = size.parameters(shape), size.non_embedding_parameters(shape)
            log.info(f"{name}: {count(total)} parameters, {count(inner)} non-embedding")
    for line in [*check.padding_lines(plan), *check.precision_lines(plan)]:
        log.info(line)
    config = plan.config
    tokens = plan.global_batch * config.data.sequence_length
    log.info(f"{_layout_line('ranks', config.student.layout, plan.student_world)}; {tokens} tokens per step")
    if plan.stage == "finetune":
        log.info(f"{config.train.steps} steps (finetune.epochs {plan.finetune.epochs}, unless train.steps is set)")
    if derived.teacher_runs(config, plan.stage):
        ranks = derived.teacher_rank_range(config, plan.world)
        where = "disjoint" if ranks.start else "colocated with the student"
        log.info(f"{_layout_line('teacher ranks', derived.teacher_layout(config), len(ranks))}; {where}")


def _layout_line(title: str, layout: Layout, ranks: int) -> str:
    data = derived.data_parallel(layout, ranks)
    sizes = f"tensor {layout.tensor}{derived.context_factor(layout)} x pipeline {layout.pipeline} x data {data}"
    return f"{title}: {ranks} = {sizes}"
