"""Batches from which nothing can be learned: reported, skipped, counted over all starts, and then the end."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures
from tests.support.state import run_poisoned

LAYOUTS = {"pp2": {"pipeline": 2}, "dp2": {}}
CHANGES = {"train__steps": 6, "train__dropout": 0.1, "data__valid": None, "checkpoint__every": 1, "checkpoint__keep": 6}
GLOBAL_BATCH = 8


def poison(
    pool: WorkerPool, part: str, steps: list[int], config: dict[str, Any], world: int
) -> tuple[list[int], list[dict[int, list[bytes]]], str]:
    """Exit codes and states of all ranks, and what the first one complained about."""
    words = ["adapt", "--config", runs.write_config(config)]
    ranks = pool.run(partial(run_poisoned, part, steps), words, world=world, initialise=False, capture=True)
    return [rank.value[0] for rank in ranks], [rank.value[1] for rank in ranks], ranks[0].stderr


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_bad_batch_is_left_out_and_a_resumed_run_does_the_same(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, part: str, layout: str
) -> None:
    changes = {**CHANGES, "train__max_skipped": 2, "student__layout": LAYOUTS[layout]}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    codes, states, stderr = poison(pool, part, [2, 4], config, 2)
    assert codes == [0, 0]
    for found in states:
        assert [found[step] == found[step - 1] for step in range(1, 7)] == [False, True, False, True, False, False]
    entries = runs.metrics(tmp_path / "run")
    assert [entry["step"] for entry in entries] == list(range(1, 7))
    bad = [entry for entry in entries if "bad_batch" in entry]
    assert [(entry["step"], entry["skipped"]) for entry in bad] == [(2, 1), (4, 2)]
    for entry in bad:
        samples = set(range((entry["step"] - 1) * GLOBAL_BATCH, entry["step"] * GLOBAL_BATCH))
        assert entry["bad_batch"] == f"{'loss' if part == 'loss' else 'gradient norm'} nan is not finite"
        assert entry["samples"] and set(entry["samples"]) <= samples
    first, second = stderr.splitlines()
    assert " capgap: warning: step 2: " in first and first.endswith("1 of at most 2 skips")
    assert f"skipped samples {bad[1]['samples']}; 2 of at most 2 skips" in second
    # The schedule counts the steps, Adam the updates; both go on as in the run that nobody stopped.
    resumed = runs.changed(config, run_dir=str(runs.rewind(tmp_path / "run", tmp_path / "resumed", step=3)))
    codes, again, _ = poison(pool, part, [2, 4], resumed, 2)
    assert codes == [0, 0]
    assert runs.metrics(tmp_path / "resumed") == entries
    assert [found[6] for found in again] == [found[6] for found in states]


@pytest.mark.parametrize("beside", [False, True], ids=["saves at once", "saves beside"])
def test_one_too_many_stops_the_run_over_all_its_starts(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, beside: bool
) -> None:
    changes = {**CHANGES, "train__max_skipped": 1, "checkpoint__async_save": beside}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    assert poison(pool, "loss", [2], config, 1)[0] == [0]
    resumed = runs.changed(config, run_dir=str(runs.rewind(tmp_path / "run", tmp_path / "resumed", step=3)))
    codes, states, stderr = poison(pool, "loss", [5], resumed, 1)
    assert codes == [2]
    assert states[0][5] == states[0][4]
    assert stderr.startswith("capgap: error: step 5: loss nan is not finite")
    assert "suspect samples [32, 33]" in stderr
    assert stderr.endswith("1 bad batches were skipped before: train.max_skipped allows no more\n")
    assert (tmp_path / "resumed" / "latest").read_text() == "step_4\n"


def test_a_gradient_norm_above_the_limit_is_a_bad_batch(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"train__steps": 8, "data__valid": None}
    free = runs.metrics(runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "free", **changes)))
    limit = (min(entry["grad_norm"] for entry in free) + max(entry["grad_norm"] for entry in free)) / 2
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes, train__max_grad_norm=limit)
    (rank,) = runs.run_stage(pool, "adapt", config)
    assert rank.value == 2
    assert f"is above train.max_grad_norm {limit:g}; weights and optimizer are as after step" in rank.stderr
    runs.train(pool, "adapt", runs.changed(config, run_dir=str(tmp_path / "skips"), train__max_skipped=8))
    entries = runs.metrics(tmp_path / "skips")
    norms = [entry["grad_norm"] for entry in entries if "grad_norm" in entry]
    bad = [entry["bad_batch"] for entry in entries if "bad_batch" in entry]
    assert bad and len(norms) + len(bad) == 8
    assert all(norm <= limit for norm in norms)
    assert all(float(what.split()[2]) > limit for what in bad)
