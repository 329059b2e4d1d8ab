"""The learning rate of every update, against the schedules of transformers."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    TrainingArguments,
    get_constant_schedule,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from megatron_capgap.config.training import OptimizerConfig
from megatron_capgap.training.optimizer import build_lr_scheduler, warmup_steps
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

PEAK = 3.0e-3
THEIRS = {
    "cosine": lambda optimizer, warmup, steps: get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, steps, min_lr=PEAK / 10
    ),
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, steps: get_constant_schedule(optimizer),
}


FRACTIONS = (0.0, 0.01, 0.03, 0.07, 0.1, 0.29, 0.5, 0.57, 0.58, 0.99)


def rates_of_transformers(schedule: str, warmup: int, steps: int) -> list[float]:
    """Of each update."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = THEIRS[schedule](optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    return rates


def test_the_warm_up_has_the_steps_of_transformers(tmp_path: Path) -> None:
    assert (warmup_steps(0.29, 100), warmup_steps(0.57, 100), warmup_steps(1.0, 7)) == (29, 57, 7)
    for fraction in FRACTIONS:
        theirs = TrainingArguments(str(tmp_path), warmup_steps=fraction)  # a number below 1 is a share
        for steps in range(2, 1001):
            assert warmup_steps(fraction, steps) == theirs.get_warmup_steps(steps), (fraction, steps)
    assert {warmup_steps(fraction, 1) for fraction in (*FRACTIONS, 1.0)} == {0}, "one update of rate 0 learns nothing"


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 100, 997])
def test_the_rates_of_transformers_at_many_lengths(schedule: str, steps: int) -> None:
    for fraction in (*FRACTIONS, 1.0):
        wanted = OptimizerConfig(
            lr=PEAK,
            min_lr=PEAK / 10 if schedule == "cosine" else 0.0,
            schedule=schedule,  # type: ignore[arg-type]
            warmup_fraction=fraction,
        )
        inner = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
        ours = build_lr_scheduler(inner, wanted, steps)  # type: ignore[arg-type]
        rates = []
        for _ in range(steps):
            rates.append(inner.param_groups[0]["lr"])
            ours.step(1)
        warmup = math.ceil(steps * fraction) if steps > 1 else 0
        assert rates == pytest.approx(rates_of_transformers(schedule, warmup, steps), rel=1e-9, abs=1e-12), fraction


@pytest.mark.parametrize(
    "schedule, warmup", [("cosine", 8), ("cosine", 2), ("cosine", 0), ("linear", 2), ("constant", 0)]
)
def test_every_update_has_the_rate_of_transformers(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, schedule: str, warmup: int
) -> None:
    steps = 8
    expected = rates_of_transformers(schedule, warmup, steps)
    changes = {"train__steps": steps, "optimizer__schedule": schedule, "optimizer__warmup_fraction": warmup / steps}
    changes |= {"optimizer__lr": PEAK, "optimizer__min_lr": PEAK / 10 if schedule == "cosine" else 0.0}
    run_dir = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "run", data__valid=None, **changes))
    assert [step["lr"] for step in runs.steps_of(run_dir)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"optimizer__min_lr": 0.0, "optimizer__warmup_fraction": 0.01}])
def test_a_run_of_one_step_learns(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, changes: dict[str, float]
) -> None:
    losses = []
    for peak in (PEAK, 1e-12):
        one = {**changes, "train__steps": 1, "optimizer__lr": peak, "optimizer__min_lr": 0.0}
        run_dir = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / f"{peak}", **one))
        assert [step["lr"] for step in runs.steps_of(run_dir)] == [peak]
        losses.append(runs.metrics(run_dir)[-1]["valid_loss"])
    assert losses[0] < losses[1] - 0.01, losses


def test_finetuning_one_epoch_of_fewer_rows_than_a_batch_learns(
    pool: WorkerPool, fixtures: Fixtures, student: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": None, "finetune__epochs": 1, "train__global_batch": 64, "train__micro_batch": 2}
    run_dir = runs.train(pool, "finetune", runs.finetune_config(fixtures, tmp_path / "run", student, **changes))
    (step,) = runs.steps_of(run_dir)
    assert step["lr"] == PEAK
