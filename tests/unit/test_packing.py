"""Rows of packed matrices: each part's rows once, in Megatron's order, and any block of them."""

import pytest

from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import packing

SHAPE = ModelShape(layers=1, hidden=12, heads=6, kv_heads=2, head_dim=3, ffn=5, vocab=7)


def rows(runs: list[packing.PackedRows]) -> list[tuple[int, int]]:
    """(part, row in the part) of each packed row."""
    return [(run.part, run.start + i) for run in runs for i in range(run.count)]


def test_queries_of_a_group_lie_before_its_key_and_value() -> None:
    group = [[(0, 9 * g + i) for i in range(9)] + [(p, 3 * g + i) for p in (1, 2) for i in range(3)] for g in (0, 1)]
    assert rows(packing.qkv(SHAPE)) == group[0] + group[1]
    assert packing.part_rows(packing.qkv(SHAPE)) == [18, 6, 6]


def test_stacked_queries_keys_and_values_are_one_part() -> None:
    first = {0: 0, 1: 18, 2: 24}
    assert rows(packing.qkv_stacked(SHAPE)) == [(0, first[part] + row) for part, row in rows(packing.qkv(SHAPE))]


def test_gate_lies_above_up() -> None:
    assert rows(packing.gate_up(SHAPE)) == [(0, i) for i in range(5)] + [(1, i) for i in range(5)]


@pytest.mark.parametrize("runs", [packing.qkv(SHAPE), packing.qkv_stacked(SHAPE), packing.gate_up(SHAPE)])
def test_any_block_of_rows_is_cut_out(runs: list[packing.PackedRows]) -> None:
    total = len(rows(runs))
    for start in range(total):
        for count in range(total - start + 1):
            block = list(packing.parts_of_rows(runs, start, count))
            assert rows(block) == rows(runs)[start : start + count]
            assert [run.packed for run in block] == [start + sum(r.count for r in block[:i]) for i in range(len(block))]
