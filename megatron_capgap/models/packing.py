"""Row order of Megatron's packed projections (fused QKV, gate and up). No torch.

A packed matrix is described as runs of consecutive rows of its parts, from top to bottom. Fused queries, keys and
values are ordered by group, each group's queries before its key and its value; gate is above up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.schema import ModelShape


@dataclass(frozen=True)
class PackedRows:
    """Consecutive rows of a packed matrix that are consecutive in one of its parts."""

    part: int
    """Index of the part."""
    start: int
    """First row in the part."""
    packed: int
    """First row in the packed matrix."""
    count: int
    """Number of rows."""


def whole(rows: int) -> list[PackedRows]:
    """A matrix of one part."""
    return [PackedRows(0, 0, 0, rows)]


def gate_up(shape: ModelShape) -> list[PackedRows]:
    """Parts: gate, up; `[ffn, ...]` each."""
    return [PackedRows(0, 0, 0, shape.ffn), PackedRows(1, 0, shape.ffn, shape.ffn)]


def qkv(shape: ModelShape) -> list[PackedRows]:
    """Parts: queries `[heads * d, ...]`, keys and values `[kv_heads * d, ...]`."""
    groups, width = derived.kv_heads(shape), derived.head_dim(shape)
    queries = shape.heads // groups * width
    counts = (queries, width, width)
    runs, packed = [], 0
    for group in range(groups):
        for part, count in enumerate(counts):
            runs.append(PackedRows(part, group * count, packed, count))
            packed += count
    return runs


def qkv_stacked(shape: ModelShape) -> list[PackedRows]:
    """One part: all queries, then all keys, then all values."""
    width = derived.head_dim(shape)
    first = (0, shape.heads * width, (shape.heads + derived.kv_heads(shape)) * width)
    return [PackedRows(0, first[run.part] + run.start, run.packed, run.count) for run in qkv(shape)]


def parts_of_rows(runs: Sequence[PackedRows], start: int, count: int) -> Iterator[PackedRows]:
    """The runs restricted to rows [start, start + count) of the packed matrix, in order."""
    for run in runs:
        first, last = max(start, run.packed), min(start + count, run.packed + run.count)
        if first < last:
            yield PackedRows(run.part, run.start + first - run.packed, first, last - first)


def arranged(source: Sequence[PackedRows], target: Sequence[PackedRows], parts: Sequence[Sequence[int]]) -> list[int]:
    """For each row of a packed matrix built from another one, the source row; -1 for a row of zeros.

    Args:
        source: runs of the matrix that rows are taken from.
        target: runs of the matrix to be built.
        parts: for each row of each part of `target`, the row of the same part of `source`, or -1.
    """
    packed = [[0] * rows for rows in part_rows(source)]
    for run in source:
        packed[run.part][run.start : run.start + run.count] = range(run.packed, run.packed + run.count)
    taken = [parts[run.part][run.start + i] for run in target for i in range(run.count)]
    owners = [run.part for run in target for _ in range(run.count)]
    return [packed[part][row] if row >= 0 else -1 for part, row in zip(owners, taken, strict=True)]


def part_rows(runs: Sequence[PackedRows]) -> list[int]:
    """Number of rows of each part."""
    rows = [0] * (1 + max(run.part for run in runs))
    for run in runs:
        rows[run.part] += run.count
    return rows
