"""Steps of the stack against the same steps of a plain float64 LLaMA: loss, its parts, gradient norm, update."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import dense, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", ["adapt", "distill"])
def test_steps_agree_with_a_plain_llama(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, stage: str, tied: bool
) -> None:
    changes: dict[str, Any] = {"optimizer__schedule": "constant", "student__model__tied_embeddings": tied}
    changes |= {
        "train__steps": 3,
        "optimizer__clip_norm": 0.5,
        "student__model__rope_theta": 500.0,
        "data__valid": None,
    }
    # Under 1e-4 Adam's first updates are the signs of gradients, and float32 does not know all of them.
    changes |= {"optimizer__epsilon": 1.0e-4, "student__layout": {"tensor": 2, "sequence": True}}
    if stage == "adapt":
        raw = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    else:
        raw = runs.distill_config(fixtures, tmp_path / "run", teacher, **changes)
    found = runs.steps_of(runs.train(pool, stage, raw, world=2))
    for mine, theirs in zip(found, dense.steps(pool, stage, raw), strict=True):
        assert mine.pop("lr") == raw["optimizer"]["lr"]
        runs.assert_close(mine, theirs, 1e-5, stage)
