"""Pipeline stages with unequal numbers of layers: the runs of one rank, in training, teaching, saving and pruning."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.config import derived
from megatron_capgap.config.schema import Layout, ModelShape
from megatron_capgap.models import size
from tests.distributed.test_overlap import MATCHED
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

TOLERANCE = 1e-5


def losses(pool: WorkerPool, config: dict[str, Any], world: int) -> list[dict[str, Any]]:
    return runs.metrics(runs.train(pool, "distill", config, world))


def assert_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        runs.assert_close(mine, theirs, TOLERANCE)


def test_teacher_and_student_matched_layers_and_recomputation(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """The teacher's stages are unequal in another way, so hidden states travel between ranks that share no layers."""
    matched = {"objective__matching": MATCHED}
    expected = losses(pool, runs.distill_config(fixtures, tmp_path / "one", teacher, **matched), 1)
    uneven = {
        "student__layout": {"pipeline": 2, "stage_layers": [3, 1]},
        "student__recompute": {"what": "full", "layers": 2},
        "teacher__layout": {"pipeline": 2, "stage_layers": [1, 3]},
    }
    assert_equal(
        losses(pool, runs.distill_config(fixtures, tmp_path / "two", teacher, **matched, **uneven), 2), expected
    )


def test_resumed_in_other_stages(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    constant = {"optimizer__schedule": "constant", "data__valid": None}
    expected = losses(pool, runs.distill_config(fixtures, tmp_path / "one", teacher, **constant), 1)
    layouts = ({"pipeline": 3, "stage_layers": [1, 1, 2]}, {"pipeline": 2, "stage_layers": [3, 1]}, {"pipeline": 2})
    for steps, layout in zip((1, 2, 4), layouts, strict=True):
        changes = {"train__steps": steps, "student__layout": layout, "teacher__layout": layout, **constant}
        config = runs.distill_config(fixtures, tmp_path / "run", teacher, **changes)
        runs.train(pool, "distill", config, layout["pipeline"])
    assert_equal(runs.metrics(tmp_path / "run"), expected)


SHAPE = ModelShape(family="llama", layers=12, hidden=64, heads=4, kv_heads=4, ffn=128, vocab=1000)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("head", [None, (1000, 512)])
def test_the_balanced_numbers_are_the_best_of_all(stages: int, head: tuple[int, int] | None) -> None:
    found = size.balanced_layers(SHAPE, stages, 128, head)
    assert sum(found) == SHAPE.layers
    every = (split for split in product(range(1, 13), repeat=stages) if sum(split) == SHAPE.layers)
    best = min(max(size.stage_work(SHAPE, split, 128, head)) for split in every)
    assert max(size.stage_work(SHAPE, found, 128, head)) == pytest.approx(best)
    total = size.training_flops(SHAPE, None, 128) + (2 * head[0] * head[1] if head else 0)
    assert sum(size.stage_work(SHAPE, found, 128, head)) == pytest.approx(total)


def test_parameters_of_the_stages_are_those_of_the_model() -> None:
    layout = Layout(pipeline=3, stage_layers=(2, 7, 3))
    on_stages = [size.rank_parameters(SHAPE, layout, stage) for stage in range(3)]
    assert sum(on_stages) == size.rank_parameters(SHAPE, Layout(), 0)
    assert derived.stages_of_layers(12, layout) == [0] * 2 + [1] * 7 + [2] * 3
