"""What the teacher's section must agree on with the rest: its layout, ranks and micro-batches, and the vocabulary."""

from collections.abc import Callable, Iterator

from megatron_capgap.config import derive
from megatron_capgap.config.case import Case, divisors, multiples
from megatron_capgap.config.schema import Teacher


def teacher_runs_forward_only(case: Case) -> Iterator[str]:
    """Virtual stages shorten the wait between forward and backward passes."""
    teacher = case.config.teacher
    if teacher and teacher.layout and teacher.layout.virtual_pipeline > 1:
        text = f"{teacher.layout.virtual_pipeline}: the teacher runs forward only, without virtual stages; 1 would do"
        yield case.problem("teacher.layout.virtual_pipeline", text)


def teacher_has_its_ranks(case: Case) -> Iterator[str]:
    """Where the teacher has ranks of its own, whole copies of it fill them, and some are left for the student."""
    teacher = case.config.teacher
    if teacher is None:
        return
    if teacher.placement == "colocated":
        if teacher.ranks is not None:
            text = f"{teacher.ranks}: a colocated teacher shares all ranks, so nothing reads this"
            yield case.problem("teacher.ranks", f"{text}; remove the key, or set teacher.placement: disjoint")
        if teacher.ahead != Teacher("").ahead:
            text = f"{teacher.ahead}: a colocated teacher takes turns with the student, so nothing reads this"
            yield case.problem("teacher.ahead", f"{text}; remove the key, or set teacher.placement: disjoint")
        return
    if teacher.ranks is None:
        text = f"null, but teacher.placement is disjoint; a number of ranks below the world's {case.world} would do"
        yield case.problem("teacher.ranks", text)
    elif teacher.ranks >= case.world:
        text = f"{teacher.ranks} leave the student none of the world of {case.world} ranks"
        yield case.problem("teacher.ranks", f"{text}; a smaller number would do, or more ranks")
    elif teacher.ranks % (ranks := derive.ranks_per_model(cut := derive.teacher_layout(case.config))):
        product = f"tensor {cut.tensor} * pipeline {cut.pipeline} * context {cut.context} = {ranks}"
        text = f"{teacher.ranks} is not divisible by the teacher's {product}"
        yield case.problem("teacher.ranks", f"{text}; {multiples(teacher.ranks, ranks)} would do")


def batch_divides_for_the_teacher(case: Case) -> Iterator[str]:
    """Every copy of the teacher runs over as many sequences, in micro-batches of its own size."""
    config = case.config
    if config.teacher is None or case.copies is None or (copies := case.teacher_copies) is None:
        return
    batch = derive.global_batch(config, config.student.layout, derive.student_world(config, case.world))
    if batch % (config.train.micro_batch * case.copies):
        return  # it does not suit the student either
    share, rest = divmod(batch, copies)
    if rest:
        said = str(batch) if config.train.global_batch else f"null means {batch}, which"
        text = f"{said} is not divisible by the teacher's data parallel {copies}"
        yield case.problem("train.global_batch", f"{text}; {multiples(batch, copies)} would do, or another layout")
    elif share % (size := derive.teacher_micro_batch(config)):
        said = str(size) if config.teacher.micro_batch else f"null means train.micro_batch {size}, which"
        text = f"{said} does not divide the {share} sequences that each of the teacher's data-parallel ranks has"
        yield case.problem("teacher.micro_batch", f"{text} of {batch}; {divisors(share)} would do")


CHECKS: tuple[Callable[[Case], Iterator[str]], ...] = (
    teacher_runs_forward_only,
    teacher_has_its_ranks,
    batch_divides_for_the_teacher,
)
