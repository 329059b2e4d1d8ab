"""The memory that --check foresees, against the resident set that a run measures."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import pruning, runs
from tests.support.pool import WorkerPool
from tests.support.processes import job
from tests.support.runs import Fixtures

pytestmark = pytest.mark.memory
SHAPE = {"layers": 6, "hidden": 256, "heads": 8, "ffn": 704, "vocab": 2000}
CASES = {
    "adapt, one rank": (1, {}),
    "adapt, small micro-batches": (1, {"train__micro_batch": 4}),
    "adapt, recomputed layers": (1, {"student__recompute": {"what": "full"}}),
    "adapt, recomputed feed-forward layers": (1, {"student__recompute": {"what": "mlp"}}),
    "distill, tensor 2 with sequence": (2, {"student__layout": {"tensor": 2, "sequence": True}}),
    "adapt, pipeline 2": (2, {"student__layout": {"pipeline": 2}, "train__global_batch": 32}),
    "finetune, one rank": (1, {"data__sequence_length": 256}),
    "prune, several micro-batches": (1, {"train__global_batch": 64}),
}


@pytest.mark.slow("models large enough that their memory stands out from the interpreter's")
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_within_15_percent(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, name: str) -> None:
    world, changes = CASES[name]
    common: dict[str, Any] = {
        "student__model": SHAPE,
        "data__sequence_length": 128,
        "train__global_batch": 16,
        "train__micro_batch": 16,
        "train__steps": 16,  # gaps in the heap grow over the first ones
        **changes,
    }
    config = runs.adapt_config(fixtures, tmp_path / "run", **common)
    stage = name.split(",")[0]
    if stage == "finetune":
        start = {**common, "train__steps": 1, "data__sequence_length": 32, "data__valid": None}
        runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "student", **start))
        del common["student__model"]
        config = runs.finetune_config(fixtures, tmp_path / "run", tmp_path / "student", **common)
    if stage in ("distill", "prune"):
        teacher = runs.adapt_config(
            fixtures, tmp_path / "teacher", **{**common, "train__steps": 1, "student__layout": {}}
        )
        config["teacher"] = {"checkpoint": str(runs.train(pool, "adapt", teacher))}
    if stage == "prune":
        smaller = {"hidden": 192, "ffn": 352}
        config = pruning.prune_config(fixtures, Path(teacher["run_dir"]), tmp_path / "run", smaller, {})
        del common["student__model"]
        config = runs.changed(config, **common)
    # Processes of their own: a resident set remembers the largest run of a worker.
    with job([stage, "--config", runs.write_config(config)], world, tmp_path / "output", cold=True) as run:
        assert run.wait(400) == [0] * world, run.stderr()
        ((measured, estimated),) = re.findall(
            r"peak memory of the fullest rank (\d+) MiB above start-up, estimated (\d+) MiB", run.stdout()
        )
    measured, estimated = int(measured), int(estimated)
    assert 0.85 < estimated / measured < 1.15, f"estimated {estimated} MiB, measured {measured} MiB"
