"""What the teacher's section must agree on with the rest: its layout, ranks and micro-batches, and the vocabulary."""

from collections.abc import Callable, Iterator

from megatron_capgap.config import derived
from megatron_capgap.config.schema import TeacherConfig
from megatron_capgap.config.validation.context import ValidationContext, divisors, multiples


def teacher_runs_forward_only(ctx: ValidationContext) -> Iterator[str]:
    """Virtual stages shorten the wait between forward and backward passes."""
    teacher = ctx.config.teacher
    if teacher and teacher.layout and teacher.layout.virtual_pipeline > 1:
        text = f"{teacher.layout.virtual_pipeline}: the teacher runs forward only, without virtual stages; 1 would do"
        yield ctx.error("teacher.layout.virtual_pipeline", text)


def teacher_has_its_ranks(ctx: ValidationContext) -> Iterator[str]:
    """Where the teacher has ranks of its own, whole copies of it fill them, and some are left for the student."""
    teacher = ctx.config.teacher
    if teacher is None:
        return
    if teacher.placement == "colocated":
        if teacher.ranks is not None:
            text = f"{teacher.ranks}: a colocated teacher shares all ranks, so nothing reads this"
            yield ctx.error("teacher.ranks", f"{text}; remove the key, or set teacher.placement: disjoint")
        if teacher.ahead != TeacherConfig("").ahead:
            text = f"{teacher.ahead}: a colocated teacher takes turns with the student, so nothing reads this"
            yield ctx.error("teacher.ahead", f"{text}; remove the key, or set teacher.placement: disjoint")
        return
    if teacher.ranks is None:
        text = f"null, but teacher.placement is disjoint; a number of ranks below the world's {ctx.world} would do"
        yield ctx.error("teacher.ranks", text)
    elif teacher.ranks >= ctx.world:
        text = f"{teacher.ranks} leave the student none of the world of {ctx.world} ranks"
        yield ctx.error("teacher.ranks", f"{text}; a smaller number would do, or more ranks")
    elif teacher.ranks % (ranks := derived.ranks_per_model(cut := derived.teacher_layout(ctx.config))):
        product = f"tensor {cut.tensor} * pipeline {cut.pipeline} * context {cut.context} = {ranks}"
        text = f"{teacher.ranks} is not divisible by the teacher's {product}"
        yield ctx.error("teacher.ranks", f"{text}; {multiples(teacher.ranks, ranks)} would do")


def batch_divides_for_the_teacher(ctx: ValidationContext) -> Iterator[str]:
    """Every copy of the teacher runs over as many sequences, in micro-batches of its own size."""
    config = ctx.config
    if config.teacher is None or ctx.dp_size is None or (copies := ctx.teacher_dp_size) is None:
        return
    batch = derived.global_batch(config, config.student.layout, derived.student_world(config, ctx.world))
    if batch % (config.train.micro_batch * ctx.dp_size):
        return  # it does not suit the student either
    share, rest = divmod(batch, copies)
    if rest:
        said = str(batch) if config.train.global_batch else f"null means {batch}, which"
        text = f"{said} is not divisible by the teacher's data parallel {copies}"
        yield ctx.error("train.global_batch", f"{text}; {multiples(batch, copies)} would do, or another layout")
    elif share % (size := derived.teacher_micro_batch(config)):
        said = str(size) if config.teacher.micro_batch else f"null means train.micro_batch {size}, which"
        text = f"{said} does not divide the {share} sequences that each of the teacher's data-parallel ranks has"
        yield ctx.error("teacher.micro_batch", f"{text} of {batch}; {divisors(share)} would do")


CHECKS: tuple[Callable[[ValidationContext], Iterator[str]], ...] = (
    teacher_runs_forward_only,
    teacher_has_its_ranks,
    batch_divides_for_the_teacher,
)
