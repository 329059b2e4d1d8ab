"""Search for the fastest layouts that fit: student and teacher, micro-batches, recomputation, placement.

Times of student and teacher are computed apart, pairs are ordered by their time, and the memory of a pair is computed
only if a lower bound of it fits. Candidates are generated from divisors; the constraints of a run decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_capgap.config import derived
from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.schema import Config, Layout, ModelShape, TeacherConfig
from megatron_capgap.models import memory, size
from megatron_capgap.planning import step_time
from megatron_capgap.planning.case import Case

BEST = 5
_TOKENS = 4 << 20  # of a step, where train.global_batch is null
_MICRO_BATCHES = (1, 2, 4, 8)
_TENSORS = (1, 2, 4, 8)  # a tensor-parallel group stays within a node
_VIRTUAL = (1, 2, 4)
_TRIES = 600  # pairs whose memory is computed exactly


_Pair = tuple[float, float, float, Config]
"""Seconds of the step, seconds of the student alone, a lower bound of the bytes, and the configuration."""


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    best: list[Case]
    """The fastest that fit, at most `BEST`, with different layouts."""
    nearest: Case | None
    """If none fits: the valid one that needs least memory; None if none is valid."""


@dataclass(frozen=True)
class _Half:
    """One model's candidate: its section of the configuration, seconds, and a lower bound of its bytes."""

    config: Config
    seconds: float
    nbytes: float


def default_batch(ranks: int, length: int) -> int:
    """Sequences of about four million tokens, a multiple of the number of ranks."""
    return max(1, round(_TOKENS / length / ranks)) * ranks


def search(case: Case) -> Found:
    """The best layouts of a run; those of the configuration are ignored. train.global_batch is set."""
    pairs = list[_Pair]()
    for config in _placements(case):
        ranks = derived.student_world(config, case.world)
        students = list(_students(case, config, ranks))
        if case.taught is None:
            pairs += [(half.seconds, half.seconds, half.nbytes, half.config) for half in students]
            continue
        apart = ranks < case.world
        for teacher in _teachers(case, config):
            for half in students:
                seconds = max(half.seconds, teacher.seconds) if apart else half.seconds + teacher.seconds
                nbytes = max(half.nbytes, teacher.nbytes) if apart else half.nbytes + teacher.nbytes
                pairs.append((seconds, half.seconds, nbytes, replace(half.config, teacher=teacher.config.teacher)))
    return _first_that_fit(case, pairs)


def _first_that_fit(case: Case, pairs: list[_Pair]) -> Found:
    best: list[Case] = []
    seen = set[object]()
    hopeful = sorted(
        (pair for pair in pairs if pair[2] <= case.limit), key=lambda pair: (round(pair[0], 6), *pair[1:3])
    )
    tries = 0
    for *_, config in hopeful:
        teacher = config.teacher and (config.teacher.layout, config.teacher.placement, config.teacher.ranks)
        key = (config.student.layout, teacher)
        if key in seen:
            continue
        other = case.changed(config)
        tries += 1
        if other.memory() <= case.limit and not other.problems():
            seen.add(key)
            best.append(other)
        if len(best) == BEST or tries == _TRIES:
            break
    if best:
        return Found(sorted(best, key=lambda other: other.step().total), None)
    for *_, config in sorted(pairs, key=lambda pair: pair[2])[:_TRIES]:
        if not (other := case.changed(config)).problems():
            return Found([other], None) if other.memory() <= case.limit else Found([], other)
    return Found([], None)


def _placements(case: Case) -> Iterator[Config]:
    """The configuration with the teacher on all ranks, and on some numbers of ranks of its own, near its share of the
    work."""
    config = case.config
    teacher = config.teacher
    if teacher is None or case.taught is None:
        yield config
        return
    yield replace(config, teacher=replace(teacher, placement="colocated", ranks=None, ahead=1))
    if case.stage == "finetune":
        return
    length = config.data.sequence_length
    work = size.forward_flops(case.taught, length)
    share = case.world * work / (work + 3 * size.forward_flops(case.student, length))
    unit = max(1, case.world // 16)
    choices = sorted(range(unit, case.world, unit), key=lambda ranks: abs(ranks - share))
    for ranks in choices[:4]:
        yield replace(config, teacher=replace(teacher, placement="disjoint", ranks=ranks, offload=False))


def _students(case: Case, config: Config, ranks: int) -> Iterator[_Half]:
    shape, forward_only = case.trained, step_time.backward_passes(config, case.stage, case.trained) == 0
    stages = "adapt" if case.taught is not None else case.stage
    for layout in _layouts(shape, config, ranks, virtual=not forward_only and case.stage != "prune"):
        for micro_batch in _micro_batches(config, layout, ranks):
            for recompute in (None,) if forward_only else (None, Recompute("mlp"), Recompute("full")):
                student = replace(config.student, layout=layout, recompute=recompute)
                train = replace(config.train, micro_batch=micro_batch)
                changed = replace(config, student=student, train=train)
                alone = replace(changed, teacher=None) if case.taught is not None else changed
                need = memory.estimate(alone, stages, case.student, case.teacher, ranks, on_cpu=False)
                if need.total > case.limit and recompute != Recompute("full") and not forward_only:
                    continue
                time = step_time.student_time(
                    changed, case.stage, shape, case.taught, ranks, case.gpu, case.utilisation
                )
                yield _Half(changed, time.total, need.total)


def _teachers(case: Case, config: Config) -> Iterator[_Half]:
    assert case.taught is not None and config.teacher is not None
    ranks = len(derived.teacher_rank_range(config, case.world))
    width = derived.BYTES[derived.teacher_precision(config).compute]
    # The student's layout plays no part in the teacher's time: the global batch is set.
    for layout in _layouts(case.taught, config, ranks, virtual=False):
        for micro_batch in _micro_batches(config, layout, ranks):
            teacher = replace(config.teacher, layout=layout, micro_batch=micro_batch)
            changed = replace(config, teacher=teacher)
            seconds = step_time.teacher_time(changed, case.taught, case.world, case.gpu, case.utilisation).total
            resident = _resident(case.taught, layout) * width if not teacher.offload else 0.0
            yield _Half(changed, seconds, resident)


def _resident(teacher: ModelShape, layout: Layout) -> float:
    """Parameters of the emptiest stage."""
    return min(size.rank_parameters(teacher, layout, stage, lm_head=False) for stage in range(layout.pipeline))


def _layouts(shape: ModelShape, config: Config, ranks: int, *, virtual: bool) -> Iterator[Layout]:
    length = config.data.sequence_length
    for tensor in _TENSORS:
        if ranks % tensor or any(number % tensor for number in (shape.heads, derived.kv_heads(shape), shape.ffn)):
            continue
        for pipeline in _divisors(shape.layers, ranks // tensor):
            if ranks % (tensor * pipeline) or (config.train.global_batch or 0) % (ranks // (tensor * pipeline)):
                continue
            for chunks in _VIRTUAL if virtual and pipeline > 1 else (1,):
                if shape.layers % (pipeline * chunks) == 0:
                    sequence = tensor > 1 and length % tensor == 0
                    yield Layout(tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, sequence=sequence)


def _micro_batches(config: Config, layout: Layout, ranks: int) -> Iterator[int]:
    share = (config.train.global_batch or 0) // derived.data_parallel(layout, ranks)
    for micro_batch in _MICRO_BATCHES:
        count, rest = divmod(share, micro_batch)
        if not rest and count and (layout.virtual_pipeline == 1 or count % layout.pipeline == 0):
            yield micro_batch


def _divisors(number: int, most: int) -> list[int]:
    return [size_ for size_ in range(1, min(number, most) + 1) if number % size_ == 0]


def yaml_lines(config: Config) -> list[str]:
    """The keys that a search sets, as lines of YAML; also those with their defaults, which replace other values."""
    student, teacher, train = config.student, config.teacher, config.train
    lines = ["student:", f"  layout: {_flow(student.layout)}"]
    lines.append(f"  recompute: {f'{{what: {student.recompute.what}}}' if student.recompute else 'null'}")
    if teacher is not None and teacher.layout is not None:
        lines += ["teacher:", *_teacher_lines(teacher)]
    return [*lines, "train:", f"  micro_batch: {train.micro_batch}", f"  global_batch: {train.global_batch}"]


def _teacher_lines(teacher: TeacherConfig) -> list[str]:
    assert teacher.layout is not None
    lines = [f"  layout: {_flow(teacher.layout)}", f"  placement: {teacher.placement}"]
    lines += [f"  ranks: {teacher.ranks or 'null'}", f"  ahead: {teacher.ahead}"]
    return [*lines, f"  micro_batch: {teacher.micro_batch}", f"  offload: {str(teacher.offload).lower()}"]


def _flow(layout: Layout) -> str:
    words = [f"tensor: {layout.tensor}", f"pipeline: {layout.pipeline}"]
    words += [f"virtual_pipeline: {layout.virtual_pipeline}"] if layout.virtual_pipeline > 1 else []
    words += ["sequence: true"] if layout.sequence else []
    return f"{{{', '.join(words)}}}"
