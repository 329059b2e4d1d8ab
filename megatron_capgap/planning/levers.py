"""Changes of a configuration that need less memory, in the order in which they cost time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_capgap.config import derived
from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.schema import Config, Layout
from megatron_capgap.planning.case import Case


def levers(case: Case) -> Iterator[tuple[str, Case]]:
    """Name and run of each lever that the constraints allow and that needs less memory than the run as it is."""
    now = case.memory()
    for name, config in _changes(case):
        other = case.changed(config)
        if not other.problems() and other.memory() < now:
            yield name, other


def _changes(case: Case) -> Iterator[tuple[str, Config]]:
    config = case.config
    student, layout, train = config.student, config.student.layout, config.train
    if student.recompute is None:
        for what in ("mlp", "full"):
            changed = replace(student, recompute=Recompute(what))
            yield f"student.recompute: {{what: {what}}}", replace(config, student=changed)
    elif student.recompute != Recompute("full"):
        yield "student.recompute: {what: full}", replace(config, student=replace(student, recompute=Recompute("full")))
    if train.micro_batch > 1:
        batch = train.global_batch or derived.global_batch(config, layout, derived.student_world(config, case.world))
        smaller = replace(config, train=replace(train, micro_batch=1, global_batch=batch))
        yield "train.micro_batch: 1", smaller
    for text, larger in _larger(layout):
        yield f"student.layout: {text}", replace(config, student=replace(student, layout=larger))
    if case.taught is not None:
        teacher = derived.teacher_section(config)
        if derived.teacher_micro_batch(config) > 1:
            yield "teacher.micro_batch: 1", replace(config, teacher=replace(teacher, micro_batch=1))
        for text, larger in _larger(derived.teacher_layout(config)):
            yield f"teacher.layout: {text}", replace(config, teacher=replace(teacher, layout=larger))
        if not teacher.offload and teacher.placement == "colocated":
            yield "teacher.offload: true", replace(config, teacher=replace(teacher, offload=True))


def _larger(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Layouts with more shards: tensor, then pipeline."""
    if layout.tensor > 1 and not layout.sequence:
        yield "{sequence: true}", replace(layout, sequence=True)
    for tensor in (2, 4, 8):
        if tensor > layout.tensor:
            yield f"{{tensor: {tensor}, sequence: true}}", replace(layout, tensor=tensor, sequence=True)
    for pipeline in (2, 4, 8):
        if pipeline > layout.pipeline:
            yield f"{{pipeline: {pipeline}}}", replace(layout, pipeline=pipeline, virtual_pipeline=1, stage_layers=None)
