"""How Megatron packs several projections into one matrix: the one place that knows. No torch.

A packed matrix is described by its rows, from top to bottom, as runs of consecutive rows of its parts. Fused queries,
keys and values lie group by group, each group's queries before its key and its value; gate lies above up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from megatron_capgap.config import derive
from megatron_capgap.config.schema import ModelShape


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a packed matrix that are consecutive in one of its parts."""

    part: int
    """Which part: 0, 1, ..."""
    start: int
    """First row in the part."""
    packed: int
    """First row in the packed matrix."""
    count: int
    """Number of rows."""


def whole(rows: int) -> list[Run]:
    """A matrix of one part."""
    return [Run(0, 0, 0, rows)]


def gate_up(shape: ModelShape) -> list[Run]:
    """Parts: gate, up; `[ffn, ...]` each."""
    return [Run(0, 0, 0, shape.ffn), Run(1, 0, shape.ffn, shape.ffn)]


def qkv(shape: ModelShape) -> list[Run]:
    """Parts: queries `[heads * d, ...]`, keys and values `[kv_heads * d, ...]`."""
    groups, width = derive.kv_heads(shape), derive.head_dim(shape)
    queries = shape.heads // groups * width
    counts = (queries, width, width)
    runs, packed = [], 0
    for group in range(groups):
        for part, count in enumerate(counts):
            runs.append(Run(part, group * count, packed, count))
            packed += count
    return runs


def qkv_stacked(shape: ModelShape) -> list[Run]:
    """One part, whose rows are all queries, then all keys, then all values."""
    width = derive.head_dim(shape)
    first = (0, shape.heads * width, (shape.heads + derive.kv_heads(shape)) * width)
    return [Run(0, first[run.part] + run.start, run.packed, run.count) for run in qkv(shape)]


def parts_of_rows(runs: Sequence[Run], start: int, count: int) -> Iterator[Run]:
    """The runs, cut to rows `start` to `start + count` of the packed matrix, in order."""
    for run in runs:
        first, last = max(start, run.packed), min(start + count, run.packed + run.count)
        if first < last:
            yield Run(run.part, run.start + first - run.packed, first, last - first)


def kept_rows(runs: Sequence[Run], kept: Sequence[Collection[int]]) -> list[int]:
    """The packed rows, in order, of which some rows of each part consist.

    Args:
        runs: of the packed matrix.
        kept: of each part, the rows that are wanted.
    """
    wanted = [set(rows) for rows in kept]
    return [run.packed + i for run in runs for i in range(run.count) if run.start + i in wanted[run.part]]


def part_rows(runs: Sequence[Run]) -> list[int]:
    """Number of rows of each part."""
    rows = [0] * (1 + max(run.part for run in runs))
    for run in runs:
        rows[run.part] += run.count
    return rows
