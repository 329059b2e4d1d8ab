"""Plan of the hidden-state transfer: which rank sends which rows to which rank, from both models' layouts. No torch.

A global batch is samples 0 to n - 1, each with `length` rows of hidden states. Of a pipeline stage's output each rank
holds a slice: the samples of its data-parallel rank, and of each sample all rows or its shard of them: two chunks under
context parallelism, of these a part under sequence parallelism. Rows that a student's rank needs but does not hold are
sent by a teacher's rank that holds them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.schema import Config, Layout, ModelShape
from megatron_capgap.data.sampler import dp_shard


@dataclass(frozen=True)
class RankSlice:
    """The part of a global batch that one rank holds or needs."""

    rank: int
    samples: tuple[int, ...]
    """In the order in which the rank processes them."""
    spans: tuple[tuple[int, int], ...]
    """Rows `start` to `stop`, the same of every sample, in the order in which the rank holds them; not adjacent."""

    @property
    def rows(self) -> int:
        """Rows of one sample."""
        return sum(stop - start for start, stop in self.spans)

    def stop_after(self, row: int) -> int | None:
        """End of the span that holds `row`; None if none does."""
        return next((stop for start, stop in self.spans if start <= row < stop), None)

    def place(self, row: int) -> int:
        """Index of a row among the rows that the rank holds of a sample."""
        before = 0
        for start, stop in self.spans:
            if start <= row < stop:
                return before + row - start
            before += stop - start
        raise AssertionError(f"row {row} is not in {self.spans}")


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` of one sample, from one rank to another; contiguous on both."""

    sample: int
    start: int
    stop: int
    source: int
    target: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class ModelPlacement:
    """Placement of one model on the ranks."""

    layout: Layout
    first_rank: int
    """Number of its first rank; its ranks are consecutive."""
    samples: tuple[tuple[int, ...], ...]
    """The samples of each data-parallel rank, in processing order."""
    length: int
    """Rows of a sample: the tokens of a sequence."""

    def rank_slices(self, stage: int) -> list[RankSlice]:
        """The slices of one pipeline stage's output, per rank in Megatron's rank order (tensor fastest, then context,
        then data, then pipeline)."""
        tensor, context = self.layout.tensor, self.layout.context
        rank = self.first_rank + stage * tensor * context * len(self.samples)
        found = []
        for samples in self.samples:
            for context_rank in range(context):
                for tensor_rank in range(tensor):
                    found.append(RankSlice(rank, samples, self._spans(context_rank, tensor_rank)))
                    rank += 1
        return found

    def _spans(self, context_rank: int, tensor_rank: int) -> tuple[tuple[int, int], ...]:
        """Rows of a sample that a rank holds."""
        layout, local = self.layout, self.length // self.layout.context
        part = local // layout.tensor
        first, last = (tensor_rank * part, (tensor_rank + 1) * part) if layout.sequence else (0, local)
        if layout.context == 1:
            return ((first, last),)
        size, found = local // 2, list[tuple[int, int]]()
        for place, chunk in enumerate(derived.context_chunks(context_rank, layout.context)):
            start, stop = max(first, place * size), min(last, (place + 1) * size)
            shift = (chunk - place) * size
            if start >= stop:
                continue
            if found and found[-1][1] == start + shift:
                start = found.pop()[0] - shift
            found.append((start + shift, stop + shift))
        return tuple(found)


def student_samples(global_batch: int, micro_batch: int, dp_size: int) -> tuple[tuple[int, ...], ...]:
    """The samples of each data-parallel rank of the student, as the data sampler distributes them.

    Args:
        global_batch: samples of a global batch.
        micro_batch: samples of a micro-batch.
        dp_size: data-parallel size.
    """
    ranks = (dp_shard(range(global_batch), micro_batch, rank, dp_size) for rank in range(dp_size))
    return tuple(tuple(sample for ids in batches for sample in ids) for batches in ranks)


def teacher_samples(of_student: Sequence[Sequence[int]], dp_size: int) -> tuple[tuple[int, ...], ...]:
    """The samples of each data-parallel rank of the teacher, in the student's order, which keeps transfers small.

    Args:
        of_student: the samples of each of the student's data-parallel ranks.
        dp_size: data-parallel size of the teacher; divides the global batch.
    """
    everything = [sample for samples in of_student for sample in samples]
    share, rest = divmod(len(everything), dp_size)
    assert rest == 0, f"{len(everything)} samples over {dp_size} replicas of the teacher"
    return tuple(tuple(everything[start : start + share]) for start in range(0, len(everything), share))


def row_ranges(held: Iterable[RankSlice], needed: Iterable[RankSlice]) -> list[RowRange]:
    """Covers every needed slice exactly once: from its own rank if that holds the rows, otherwise from the holder with
    the fewest rows to send so far.

    Args:
        held: slices of the teacher; several ranks may hold the same rows.
        needed: slices of the student.

    Returns:
        Row ranges in the same order on every rank; those with `source == target` are not sent.
    """
    holders: dict[int, list[RankSlice]] = defaultdict(list)
    for rank_slice in held:
        for sample in rank_slice.samples:
            holders[sample].append(rank_slice)
    rows_sent: dict[int, int] = defaultdict(int)
    found = []
    for rank_slice in needed:
        for sample in rank_slice.samples:
            for start, last in rank_slice.spans:
                while start < last:
                    able = [(holder, stop) for holder in holders[sample] if (stop := holder.stop_after(start))]
                    # A rank that holds the row itself receives nothing.
                    best, stop = min(
                        able, key=lambda one: (one[0].rank != rank_slice.rank, rows_sent[one[0].rank], one[0].rank)
                    )
                    stop = min(stop, last)
                    found.append(RowRange(sample, start, stop, best.rank, rank_slice.rank))
                    if best.rank != rank_slice.rank:
                        rows_sent[best.rank] += stop - start
                    start = stop
    return found


FINAL_HIDDEN = 0
"""The stream of the states after the final norm; other streams have the number of the teacher's layer, from 1."""


@dataclass(frozen=True)
class TensorStream:
    """One rank's part in the transfer of one output of the teacher."""

    key: int
    """`FINAL_HIDDEN` or the number of a teacher's layer."""
    held: RankSlice | None
    """The teacher's slice on this rank; None if it has none."""
    needed: RankSlice | None
    """The slice that the student needs on this rank; None if it needs none."""
    row_ranges: tuple[RowRange, ...]
    """Row ranges that this rank sends or receives, in the same order as on the peer."""


@dataclass(frozen=True)
class StageRoute:
    """From the teacher's stage that computes an output to the student's stages that need it."""

    key: int
    """`FINAL_HIDDEN` or the number of a teacher's layer."""
    teacher_stage: int
    student_stages: tuple[int, ...]


def streams(
    teacher: ModelPlacement, student: ModelPlacement, routes: Iterable[StageRoute], rank: int
) -> list[TensorStream]:
    """One rank's part in the transfer of every output; the same order of streams on all ranks."""
    found = []
    for route in routes:
        held = teacher.rank_slices(route.teacher_stage)
        needed = [rank_slice for stage in route.student_stages for rank_slice in student.rank_slices(stage)]
        mine = tuple(each for each in row_ranges(held, needed) if rank in (each.source, each.target))
        my_held, my_needed = (next((each for each in slices if each.rank == rank), None) for slices in (held, needed))
        found.append(TensorStream(route.key, my_held, my_needed, mine))
    return found


def model_placements(config: Config, world: int) -> tuple[ModelPlacement, ModelPlacement]:
    """The placements of the teacher and the student in a run.

    Args:
        config: checked.
        world: number of ranks, the teacher's own included.
    """
    teacher_layout, ranks = derived.teacher_layout(config), derived.teacher_rank_range(config, world)
    student, length = config.student.layout, config.data.sequence_length
    students = derived.student_world(config, world)
    batch, dp_size = derived.global_batch(config, student, students), derived.data_parallel(student, students)
    samples = student_samples(batch, config.train.micro_batch, dp_size)
    shares = teacher_samples(samples, derived.data_parallel(teacher_layout, len(ranks)))
    return ModelPlacement(teacher_layout, ranks.start, shares, length), ModelPlacement(student, 0, samples, length)


def routes(config: Config, teacher: ModelShape, student: ModelShape) -> list[StageRoute]:
    """Every output of the teacher that a run needs: the last one, and those of matched layers in ascending order."""
    teacher_layout = derived.teacher_layout(config)
    of_teacher = derived.stages_of_layers(teacher.layers, teacher_layout)
    of_student = derived.stages_of_layers(student.layers, config.student.layout)
    stages: dict[int, set[int]] = defaultdict(set)
    for pair in config.objective.matching:
        stages[pair.teacher_layer].add(of_student[pair.student_layer - 1])
    found = [StageRoute(FINAL_HIDDEN, teacher_layout.pipeline - 1, (config.student.layout.pipeline - 1,))]
    return found + [StageRoute(layer, of_teacher[layer - 1], tuple(sorted(stages[layer]))) for layer in sorted(stages)]
