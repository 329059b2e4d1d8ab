"""The learning rate of every update, against the schedules of transformers."""

from pathlib import Path

import pytest
import torch
from transformers import (
    get_constant_schedule,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Material

PEAK = 3.0e-3
THEIRS = {
    "cosine": lambda optimizer, warmup, steps: get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, steps, min_lr=PEAK / 10
    ),
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, steps: get_constant_schedule(optimizer),
}


@pytest.mark.parametrize("schedule, warmup", [("cosine", 2), ("cosine", 0), ("linear", 2), ("constant", 0)])
def test_every_update_has_the_rate_of_transformers(
    pool: WorkerPool, material: Material, tmp_path: Path, schedule: str, warmup: int
) -> None:
    steps = 8
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = THEIRS[schedule](optimizer, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    changes = {"train__steps": steps, "optimizer__schedule": schedule, "optimizer__warmup_fraction": warmup / steps}
    changes |= {"optimizer__lr": PEAK, "optimizer__min_lr": PEAK / 10 if schedule == "cosine" else 0.0}
    run_dir = runs.train(pool, "adapt", runs.adapt_config(material, tmp_path / "run", data__valid=None, **changes))
    assert [step["lr"] for step in runs.steps_of(run_dir)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"optimizer__min_lr": 0.0, "optimizer__warmup_fraction": 0.01}])
def test_a_run_of_one_step_learns(
    pool: WorkerPool, material: Material, tmp_path: Path, changes: dict[str, float]
) -> None:
    losses = []
    for peak in (PEAK, 1e-12):
        one = {**changes, "train__steps": 1, "optimizer__lr": peak, "optimizer__min_lr": 0.0}
        run_dir = runs.train(pool, "adapt", runs.adapt_config(material, tmp_path / f"{peak}", **one))
        assert [step["lr"] for step in runs.steps_of(run_dir)] == [peak]
        losses.append(runs.metrics(run_dir)[-1]["valid_loss"])
    assert losses[0] < losses[1] - 0.01, losses


def test_finetuning_one_epoch_of_fewer_rows_than_a_batch_learns(
    pool: WorkerPool, material: Material, student: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": None, "finetune__epochs": 1, "train__global_batch": 64, "train__micro_batch": 2}
    run_dir = runs.train(pool, "finetune", runs.finetune_config(material, tmp_path / "run", student, **changes))
    (step,) = runs.steps_of(run_dir)
    assert step["lr"] == PEAK
