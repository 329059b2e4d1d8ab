"""Plans from scores: what stays, in which order, and the file that says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import packing, size
from megatron_capgap.pruning import importance_scores as files
from megatron_capgap.pruning import prune_plan
from megatron_capgap.pruning.importance_scores import Scores
from megatron_capgap.pruning.student_shape import Budget

TEACHER = ModelShape(layers=5, hidden=6, heads=6, kv_heads=2, head_dim=2, ffn=4, vocab=7)
CPU = torch.device("cpu")


def scores_of(**fields: list) -> Scores:
    """Zeros but for some fields."""
    known = {name: torch.tensor(value, dtype=torch.float64) for name, value in fields.items()}
    return replace(Scores.zeros(TEACHER, CPU), **known)


def test_the_best_stay_in_their_order() -> None:
    neurons = [[1, 4, 3, 2], [4, 3, 2, 1], [0, 0, 0, 0], [1, 1, 2, 2], [1, 2, 3, 4]]
    student = replace(TEACHER, ffn=2, hidden=3)
    scores = scores_of(neurons=neurons, channels=[0.1, 5, 0.2, 7, 6, 0.3])
    found = prune_plan.make(TEACHER, student, scores, "position")
    assert found.neurons == ((1, 2), (0, 1), (0, 1), (2, 3), (2, 3))
    assert found.channels == (1, 3, 4)


@pytest.mark.parametrize(
    ("layers", "by", "expected"),
    [
        (3, "position", (1, 2, 3)),
        (2, "position", (1, 2)),
        (4, "position", (0, 1, 2, 3)),
        (3, "importance", (0, 1, 4)),
        (1, "importance", (4,)),
    ],
)
def test_layers_go_at_the_ends_or_by_their_scores(layers: int, by: str, expected: tuple[int, ...]) -> None:
    scores = scores_of(layers=[3, 2, 1, 0, 9], neurons=[[i, 0, 0, 5] if i < 3 else [9, 9, 0, 0] for i in range(5)])
    found = prune_plan.make(TEACHER, replace(TEACHER, layers=layers, ffn=1), scores, by)
    assert found.layers == expected
    assert found.neurons == tuple((3,) if layer < 3 else (0,) for layer in expected)


def test_groups_go_whole_and_queries_within_groups() -> None:
    heads = [[9, 9, 9, 1, 2, 3]] * 5
    scores = scores_of(heads=heads, groups=[[1, 2]] * 5)
    one_group = prune_plan.make(TEACHER, replace(TEACHER, heads=3, kv_heads=1), scores, "position")
    assert one_group.kv_heads[0] == (1,) and one_group.heads[0] == (3, 4, 5)
    two_queries = prune_plan.make(TEACHER, replace(TEACHER, heads=4, kv_heads=2), scores, "position")
    assert two_queries.kv_heads[0] == (0, 1) and two_queries.heads[0] == (0, 1, 4, 5)


def test_gains_make_up_for_the_channels_that_go() -> None:
    squares = torch.ones(11, 6, dtype=torch.float64)
    squares[:, 4:] = 0  # two dead channels
    squares[3] = torch.tensor([3.0, 1, 1, 1, 0, 0])
    student = replace(TEACHER, hidden=4, layers=3)
    scores = scores_of(squares=squares.tolist(), channels=[1, 1, 1, 1, 0, 0])
    found = prune_plan.make(TEACHER, student, scores, "position")
    assert found.gains == pytest.approx([1.5**0.5] * 7)  # 4 of 6 channels hold all of the sum
    assert prune_plan.make(TEACHER, replace(TEACHER, layers=3), scores, "position").gains == (1.0,) * 7
    fewer = prune_plan.make(TEACHER, replace(student, hidden=3), scores, "position")
    assert fewer.gains[1] == pytest.approx(((5 / 3) / 1) ** 0.5)  # layer 1, before feed-forward: norm 3


def test_parts_are_ranked_over_all_layers() -> None:
    """By scores that each layer's norm divides, in units of two, of which a layer keeps one at least."""
    neurons = [[1000, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [3, 4, 3, 4], [0, 9, 0, 0]]
    groups = [[5, 1], [1, 0], [0, 0], [1, 1], [0, 3]]
    budget = Budget(kv_heads=6, storable_kv_heads=(1, 2), neurons=14, unit=2, max_neurons=4, tensor=1)
    scores = scores_of(neurons=neurons, groups=groups)
    found = prune_plan.make(TEACHER, replace(TEACHER, heads=3, kv_heads=1, ffn=2), scores, "position", budget)
    assert found.neurons == ((0, 1), (0, 1, 2, 3), (0, 1), (0, 1, 2, 3), (0, 1))
    assert found.kv_heads == ((0,), (0,), (0,), (0, 1), (1,)) and found.heads[3] == (0, 1, 2, 3, 4, 5)
    assert (found.student.heads, found.student.kv_heads, found.student.ffn) == (6, 2, 4)
    assert derived.head_dim(found.student) == 2
    assert found.kept_parts == {"kv_heads": [1, 1, 1, 2, 1], "heads": [3, 3, 3, 6, 3], "ffn": [2, 4, 2, 4, 2]}
    # Four groups: 3 queries, a key, a value and 3 outputs, 2 wide each; six neurons: gate, up and down. 6 channels.
    assert found.padding == 4 * (3 + 1 + 1 + 3) * 2 * 6 + 6 * 3 * 6
    fewer = prune_plan.make(
        TEACHER, replace(TEACHER, ffn=2), scores, "position", replace(budget, max_neurons=2, neurons=10)
    )
    assert found.neurons[1] != fewer.neurons[1] and {len(row) for row in fewer.neurons} == {2}


@pytest.mark.parametrize(
    ("kept", "stored", "shards", "expected"),
    [
        ((4, 5, 6), 3, 1, [4, 5, 6]),
        ((4, 5, 6), 5, 1, [4, 5, 6, -1, -1]),
        ((4, 5, 6), 4, 2, [4, -1, 5, 6]),
        ((4, 5, 6, 7, 8), 12, 3, [4, -1, -1, -1, 5, 6, -1, -1, 7, 8, -1, -1]),
        ((4,), 4, 4, [-1, -1, -1, 4]),
    ],
)
def test_kept_parts_are_spread_over_shards(kept: tuple[int, ...], stored: int, shards: int, expected: list) -> None:
    assert prune_plan.pad_per_shard(kept, stored, shards) == expected


def test_the_file_is_json_with_a_line_a_row() -> None:
    student = replace(TEACHER, layers=2, ffn=2)
    scores = scores_of(neurons=[[1 / 3, 2, 3, 4]] * 5)
    found = prune_plan.make(TEACHER, student, scores, "position")
    text = prune_plan.text(found, scores, {"prune.batches": 2, "data.train": ["a"]})
    content = json.loads(text)
    assert content["stays"]["neurons"] == [[2, 3], [2, 3]] and content["stays"]["layers"] == [1, 2]
    assert content["made_from"] == {"prune.batches": 2, "data.train": ["a"]}
    assert content["after"]["ffn"] == 2 and content["before"]["ffn"] == 4
    assert content["kept_by_layer"] == {"kv_heads": [2, 2], "heads": [6, 6], "ffn": [2, 2]}
    counts = content["parameters"]
    assert counts["kept"] == counts["stored"] == size.parameters(student)
    assert counts["kept_non_embedding"] == counts["stored_non_embedding"] == size.non_embedding_parameters(student)
    assert content["scores"]["neurons"][0] == pytest.approx([x / 29.1111111**0.5 for x in (1 / 3, 2, 3, 4)], rel=1e-5)
    assert "   [2, 3],\n" in text


def test_scores_are_kept_and_refused(tmp_path: Path) -> None:
    facts = {"prune.batches": 4, "data.train": ["a", "b"]}
    assert files.read(tmp_path, TEACHER, facts)[1] == 0
    scores = scores_of(channels=[1 / 3, 2, 3, 4, 5, 6])
    files.write(tmp_path, scores, 3, facts)
    found, batches = files.read(tmp_path, TEACHER, facts)
    assert batches == 3 and torch.equal(found.vector(), scores.vector())
    with pytest.raises(UserError, match=r"scores.json: was computed with data.train \['a', 'b'\], not \['a'\]; choose"):
        files.read(tmp_path, TEACHER, {**facts, "data.train": ["a"]})
    with pytest.raises(UserError, match=r"heads is \[5, 6\], the teacher's is \[5, 8\]; remove it"):
        files.read(tmp_path, replace(TEACHER, heads=8), facts)
    (tmp_path / files.FILE).write_text("{")
    with pytest.raises(UserError, match=r"scores.json: cannot be read .*; remove it"):
        files.read(tmp_path, TEACHER, facts)


def test_kept_rows_of_packed_matrices_are_the_student_s_own_packing() -> None:
    """What stays of packed rows, taken apart as the student's shape says, is what stays of each part."""
    heads, groups, width = (0, 2, 3, 5), (0, 1), 2
    small, kept = replace(TEACHER, heads=4), [heads, groups, groups]
    wide = [[part[row // width] * width + row % width for row in range(len(part) * width)] for part in kept]
    rows = packing.arranged(packing.qkv(TEACHER), packing.qkv(small), wide)
    whole = {run.packed + i: (run.part, run.start + i) for run in packing.qkv(TEACHER) for i in range(run.count)}
    expected = [
        (run.part, kept[run.part][(run.start + i) // width] * width + (run.start + i) % width)
        for run in packing.qkv(small)
        for i in range(run.count)
    ]
    assert [whole[row] for row in rows] == expected
