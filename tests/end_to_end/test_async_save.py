"""Checkpoints that are written while training goes on: the same files, of the step at which they were begun."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.cli import main
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import wait_for
from tests.support.runs import Fixtures

CHANGES = {"train__steps": 9, "train__dropout": 0.1, "checkpoint__every": 3, "checkpoint__keep": 9}
LAYOUTS = {"one rank": (1, {}), "tp2 x pp2": (4, {"tensor": 2, "pipeline": 2}), "dp2": (2, {})}


def steps_done(run_dir: Path) -> int:
    return max([entry["step"] for entry in runs.steps_of(run_dir)], default=0)


def write_late(run_dir: Path, last: int, words: list[str]) -> tuple[int, dict[str, int]]:
    """Runs a command on a rank that writes its part of a checkpoint two steps later, but for the last one.

    Returns:
        The exit code, and for each checkpoint the steps that were done when the writing began.
    """
    from megatron_capgap.checkpoint import writer

    write, begun = writer.write, {}

    def wait_and_write(folder: Path, *rest: Any) -> None:
        step = int(folder.name.split("_")[1].split(".")[0])
        wait_for(lambda: steps_done(run_dir) >= min(step + 2, last), 120, f"two steps after step {step}")
        begun[folder.name] = steps_done(run_dir)
        write(folder, *rest)

    writer.write = wait_and_write
    try:
        return main(words), begun
    finally:
        writer.write = write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_and_the_files_are_those_of_a_run_that_waits(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, layout: str
) -> None:
    world, cut = LAYOUTS[layout]
    changes = {**CHANGES, "student__layout": cut}
    waits = runs.distill_config(fixtures, tmp_path / "waits", teacher, **changes)
    runs.train(pool, "distill", waits, world)
    beside = runs.distill_config(fixtures, tmp_path / "beside", teacher, **changes, checkpoint__async_save=True)
    words = ["distill", "--config", runs.write_config(beside)]
    work = partial(write_late, tmp_path / "beside", CHANGES["train__steps"], words)
    for rank in pool.run(work, world=world, initialise=False, capture=True):
        code, begun = rank.value
        assert code == 0, rank.stderr
        # A save waits for the one before: that of step 6 begins when that of step 3 is on disk.
        # A step more may have been taken by the time the writer looks, but no save is later than that.
        assert begun.keys() == {f".step_{step}.incomplete" for step in (3, 6, 9)}
        assert begun[".step_3.incomplete"] in (5, 6) and begun[".step_6.incomplete"] in (8, 9)
        assert begun[".step_9.incomplete"] == 9
    assert runs.metrics(tmp_path / "beside") == runs.metrics(tmp_path / "waits")
    one, other = (runs.files_of(tmp_path / name / "checkpoints") for name in ("waits", "beside"))
    assert one.keys() == other.keys() and len(one) > 15
    # .metadata names the folder it was written to, and contents.json has its checksum.
    apart = {Path(name).name for name in one if one[name] != other[name]}
    assert apart <= {".metadata", "contents.json"}


def test_a_run_goes_on_from_it_to_the_last_digit(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    changes = {**CHANGES, "student__layout": {"pipeline": 2}, "checkpoint__async_save": True}
    unbroken = runs.train(pool, "distill", runs.distill_config(fixtures, tmp_path / "run", teacher, **changes), 2)
    resumed = runs.rewind(unbroken, tmp_path / "resumed", step=6)
    runs.train(pool, "distill", runs.distill_config(fixtures, resumed, teacher, **changes), 2)
    assert runs.metrics(resumed) == runs.metrics(unbroken)


def test_the_best_checkpoint_is_on_disk_before_it_is_named(
    pool: WorkerPool, fixtures: Fixtures, student: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": 4, "train__eval_every": 1, "finetune__patience": 3, "checkpoint__async_save": True}
    run_dir = runs.train(pool, "finetune", runs.finetune_config(fixtures, tmp_path / "run", student, **changes))
    assert (run_dir / "best").read_text().strip() in runs.checkpoints(run_dir)
