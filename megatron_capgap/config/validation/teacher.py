"""Constraints on the teacher: layout, ranks and micro-batches."""

from collections.abc import Callable, Iterator

from megatron_capgap.config import derived
from megatron_capgap.config.schema import TeacherConfig
from megatron_capgap.config.validation.context import ValidationContext, divisors, multiples


def teacher_runs_forward_only(ctx: ValidationContext) -> Iterator[str]:
    """Virtual stages reduce pipeline bubbles between forward and backward passes only."""
    teacher = ctx.config.teacher
    if teacher and teacher.layout and teacher.layout.virtual_pipeline > 1:
        text = f"{teacher.layout.virtual_pipeline}: the teacher runs forward only; valid value: 1"
        yield ctx.error("teacher.layout.virtual_pipeline", text)


def teacher_has_its_ranks(ctx: ValidationContext) -> Iterator[str]:
    """The ranks of a disjoint teacher hold whole replicas of it, and some ranks remain for the student."""
    teacher = ctx.config.teacher
    if teacher is None:
        return
    if teacher.placement == "colocated":
        if teacher.ranks is not None:
            text = f"{teacher.ranks}: a colocated teacher uses all ranks, so this key has no effect"
            yield ctx.error("teacher.ranks", f"{text}; remove the key, or set teacher.placement: disjoint")
        if teacher.ahead != TeacherConfig("").ahead:
            text = f"{teacher.ahead}: a colocated teacher alternates with the student, so this key has no effect"
            yield ctx.error("teacher.ahead", f"{text}; remove the key, or set teacher.placement: disjoint")
        return
    if teacher.ranks is None:
        text = f"null, but teacher.placement is disjoint; set it to a number below the world size {ctx.world}"
        yield ctx.error("teacher.ranks", text)
    elif teacher.ranks >= ctx.world:
        text = f"{teacher.ranks} leaves no rank for the student, the world size is {ctx.world}"
        yield ctx.error("teacher.ranks", f"{text}; use a smaller value, or more ranks")
    elif teacher.ranks % (ranks := derived.ranks_per_model(layout := derived.teacher_layout(ctx.config))):
        product = f"tensor {layout.tensor} * pipeline {layout.pipeline} * context {layout.context} = {ranks}"
        text = f"{teacher.ranks} is not divisible by the teacher's {product}"
        yield ctx.error("teacher.ranks", f"{text}; nearest valid values: {multiples(teacher.ranks, ranks)}")


def batch_divides_for_the_teacher(ctx: ValidationContext) -> Iterator[str]:
    """Every teacher replica processes the same number of sequences, in micro-batches of its own size."""
    config = ctx.config
    if config.teacher is None or ctx.dp_size is None or (teacher_dp_size := ctx.teacher_dp_size) is None:
        return
    batch = derived.global_batch(config, config.student.layout, derived.student_world(config, ctx.world))
    if batch % (config.train.micro_batch * ctx.dp_size):
        return  # reported for the student already
    share, rest = divmod(batch, teacher_dp_size)
    if rest:
        batch_text = str(batch) if config.train.global_batch else f"null means {batch}, which"
        text = f"{batch_text} is not divisible by the teacher's data-parallel size {teacher_dp_size}"
        yield ctx.error(
            "train.global_batch",
            f"{text}; nearest valid values: {multiples(batch, teacher_dp_size)}, or use another layout",
        )
    elif share % (size := derived.teacher_micro_batch(config)):
        batch_text = str(size) if config.teacher.micro_batch else f"null means train.micro_batch {size}, which"
        text = f"{batch_text} does not divide the {share} sequences that each of the teacher's data-parallel ranks has"
        yield ctx.error("teacher.micro_batch", f"{text} of {batch}; valid values: {divisors(share)}")


CHECKS: tuple[Callable[[ValidationContext], Iterator[str]], ...] = (
    teacher_runs_forward_only,
    teacher_has_its_ranks,
    batch_divides_for_the_teacher,
)
