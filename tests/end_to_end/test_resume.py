"""Killed and started again: the same numbers as a run that nobody stopped."""

import importlib
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.cli import main
from tests.support import runs
from tests.support.pool import WorkerError, WorkerPool
from tests.support.processes import job
from tests.support.runs import Fixtures

TP2_PP2 = {"tensor": 2, "pipeline": 2, "sequence": True}


def last_step(run_dir: Path) -> int:
    steps = runs.steps_of(run_dir)
    return steps[-1]["step"] if steps else 0


def kill_myself_after(step: int, words: list[str]) -> int:
    """Runs a command on a rank that dies by SIGKILL once `step` stands in metrics.jsonl."""
    from megatron_capgap.training import loop

    report = loop._log_step

    def report_and_die(run: loop.TrainingRun, done: int, *rest: Any) -> None:
        report(run, done, *rest)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop._log_step = report_and_die
    return main(words)


def kill_myself_in_the_second_save(moment: str, words: list[str]) -> int:
    """Runs a command on a rank that dies by SIGKILL just before it does one part of its second save."""
    module, name = moment.split()
    module = importlib.import_module(f"megatron_capgap.{module}")
    part, saves = getattr(module, name), []

    def part_or_death(*arguments: Any) -> Any:
        saves.append(arguments)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return part(*arguments)

    setattr(module, name, part_or_death)
    return main(words)


def run_and_lose(pool: WorkerPool, work: partial[int], world: int) -> None:
    with pytest.raises(WorkerError, match="died with exit code -9"):
        pool.run(work, world=world, initialise=False)


@pytest.mark.slow("sixty steps, so that a kill falls between two checkpoints")
def test_a_killed_process_goes_on_to_the_last_digit(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"train__steps": 60, "train__eval_every": 20, "train__dropout": 0.1, "checkpoint__every": 20}
    unbroken = runs.metrics(runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "unbroken", **changes)))
    killed = tmp_path / "killed"
    words = ["adapt", "--config", runs.write_config(runs.adapt_config(fixtures, killed, **changes))]
    with job(words, 1, tmp_path / "first") as first:
        first.wait_until(lambda: last_step(killed) >= 22)
        first.signal(signal.SIGKILL)
        assert first.wait() == [-signal.SIGKILL]
        assert first.left_behind() == []
    assert (killed / "latest").read_text() == "step_20\n"
    lost = last_step(killed)
    assert lost in range(22, 40)
    with job(words, 1, tmp_path / "second") as second:
        assert second.wait() == [0], second.stderr()
        assert f"resumed from {killed}/checkpoints/step_20: step 20 of 60" in second.stdout()
    assert runs.metrics(killed) == unbroken
    assert [entry["step"] for entry in runs.steps_of(killed)] == list(range(1, 61))


@pytest.mark.slow("four ranks train three times")
def test_four_killed_ranks_go_on_to_the_last_digit(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """Distillation under TP2 x PP2 with dropout: every rank's random state goes on too."""
    changes = {"train__steps": 6, "train__dropout": 0.1, "checkpoint__every": 2, "student__layout": TP2_PP2}
    unbroken = runs.distill_config(fixtures, tmp_path / "unbroken", teacher, **changes)
    broken = runs.distill_config(fixtures, tmp_path / "broken", teacher, **changes)
    words = ["distill", "--config", runs.write_config(broken)]
    run_and_lose(pool, partial(kill_myself_after, 3, words), world=4)
    assert last_step(tmp_path / "broken") == 3
    assert (tmp_path / "broken" / "latest").read_text() == "step_2\n"
    ranks = runs.run_stage(pool, "distill", broken, world=4)
    assert [rank.value for rank in ranks] == [0] * 4
    assert ranks[0].stdout.startswith("device cpu, backend gloo"), "the table of the engine and its parts comes first"
    assert "step_2: step 2 of 6" in ranks[0].stdout
    assert runs.metrics(tmp_path / "broken") == runs.metrics(runs.train(pool, "distill", unbroken, world=4))


def test_dropout_was_on(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """Otherwise the random state above resumes for nothing; two different seeds of a worker change nothing."""
    with_dropout = runs.adapt_config(fixtures, tmp_path / "with", train__steps=1, train__dropout=0.1)
    without = runs.adapt_config(fixtures, tmp_path / "without", train__steps=1)
    one, other = (runs.metrics(runs.train(pool, "adapt", config))[0] for config in (with_dropout, without))
    assert abs(one["loss"] - other["loss"]) > 1e-4


@pytest.mark.slow("one training for each layout")
def test_a_checkpoint_goes_on_in_other_layouts(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"train__steps": 6, "checkpoint__every": 3}
    config = runs.adapt_config(fixtures, tmp_path / "tp2_pp2", student__layout=TP2_PP2, **changes)
    expected = runs.metrics(runs.train(pool, "adapt", config, world=4))
    for name, world in (("one_rank", 1), ("dp2", 2)):
        run_dir = runs.rewind(tmp_path / "tp2_pp2", tmp_path / name, step=3)
        found = runs.metrics(runs.train(pool, "adapt", runs.adapt_config(fixtures, run_dir, **changes), world))
        assert found[:3] == expected[:3], "steps before the checkpoint stay as they were"
        for mine, theirs in zip(found[3:], expected[3:], strict=True):
            runs.assert_close(mine, theirs, 1e-5, name)


def test_a_longer_run_reads_on_where_the_shorter_one_ended(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"optimizer__schedule": "constant", "data__valid": None}
    whole = runs.adapt_config(fixtures, tmp_path / "whole", train__steps=6, **changes)
    parts = runs.adapt_config(fixtures, tmp_path / "parts", train__steps=3, **changes)
    runs.train(pool, "adapt", parts)
    runs.train(pool, "adapt", runs.changed(parts, train__steps=6))
    assert runs.metrics(tmp_path / "parts") == runs.metrics(runs.train(pool, "adapt", whole))


def test_a_finished_run_does_nothing_and_says_so(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "run", train__steps=2)
    before = runs.files_of(runs.train(pool, "adapt", config))
    (rank,) = runs.run_stage(pool, "adapt", config)
    assert rank.value == 0
    assert "nothing to do: all 2 steps are done" in rank.stdout
    assert runs.files_of(tmp_path / "run") == before


def test_the_newest_checkpoints_stay(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"train__steps": 5, "checkpoint__every": 1, "checkpoint__keep": 3, "data__valid": None}
    run_dir = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "run", **changes))
    assert runs.checkpoints(run_dir) == ["step_3", "step_4", "step_5"]
    assert (run_dir / "latest").read_text() == "step_5\n"


MOMENTS = ("checkpoint.writer write", "checkpoint.integrity write_checksums", "checkpoint.metadata write")
MOMENTS += ("checkpoint.run_directory put_in_place", "checkpoint.run_directory set_latest")
SIX_STEPS = {"train__steps": 6, "checkpoint__every": 2, "data__valid": None}


@pytest.fixture(scope="module")
def six_steps(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saves every second step and that nobody stops."""
    folder = tmp_path_factory.mktemp("unbroken")
    return runs.train(pool, "adapt", runs.adapt_config(fixtures, folder / "run", **SIX_STEPS))


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_save_that_is_killed_leaves_the_older_checkpoint(
    pool: WorkerPool, fixtures: Fixtures, six_steps: Path, tmp_path: Path, moment: str, beside: bool
) -> None:
    broken = runs.adapt_config(fixtures, tmp_path / "broken", **SIX_STEPS, checkpoint__async_save=beside)
    words = ["adapt", "--config", runs.write_config(broken)]
    run_and_lose(pool, partial(kill_myself_in_the_second_save, moment, words), 1)
    named = moment.endswith("set_latest")
    assert runs.checkpoints(tmp_path / "broken") == (
        ["step_2", "step_4"] if named else [".step_4.incomplete", "step_2"]
    )
    assert (tmp_path / "broken" / "latest").read_text() == "step_2\n"
    runs.train(pool, "adapt", broken)
    assert runs.checkpoints(tmp_path / "broken") == ["step_4", "step_6"]
    assert runs.metrics(tmp_path / "broken") == runs.metrics(six_steps)


@pytest.fixture(scope="module")
def taught(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished distillation."""
    run_dir = tmp_path_factory.mktemp("taught") / "run"
    return runs.train(pool, "distill", runs.distill_config(fixtures, run_dir, teacher, train__steps=2))


@pytest.mark.parametrize(
    ("changes", "key", "was", "now"),
    [
        ({"objective__divergence": "reverse_kl"}, "objective.divergence", "forward_kl", "reverse_kl"),
        ({"objective__temperature": 4.0}, "objective.temperature", "2.0", "4.0"),
        ({"data__train_weights": [1.0]}, "data.train_weights", "none", "1.0"),
        (
            {"objective__matching": [{"student_layer": 1, "teacher_layer": 2}]},
            "objective.matching",
            "none",
            "1_2_mse x 1",
        ),
    ],
)
def test_a_run_goes_on_with_what_it_learns_from(
    fixtures: Fixtures, teacher: Path, taught: Path, capsys: Any, changes: dict[str, Any], key: str, was: str, now: str
) -> None:
    before = runs.files_of(taught)
    config = runs.distill_config(fixtures, taught, teacher, train__steps=4, **changes)
    assert main(["distill", "--config", runs.write_config(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{key}: {taught} was started with {was}, this start has {now}; restore the former or" in line
    assert runs.files_of(taught) == before


def test_a_run_goes_on_with_its_teacher_and_its_data(
    fixtures: Fixtures, teacher: Path, student: Path, taught: Path, tmp_path: Path, capsys: Any
) -> None:
    held_out = fixtures.data["valid"]
    copied = tmp_path / "copied"
    shutil.copytree(teacher, copied)
    listed = copied / "checkpoints" / (copied / "latest").read_text().strip() / "contents.json"
    listed.write_text(listed.read_text() + " ")  # as many steps, tokens and parameters, and not the same
    for changes, said in (
        ({"teacher__checkpoint": str(copied)}, f"teacher.checkpoint: {taught} was started with {teacher}/"),
        ({"teacher__checkpoint": str(taught)}, f"teacher.checkpoint: {taught} was started with {teacher}/"),
        ({"data__train": held_out}, "data.train: "),
        ({"student__model": None, "student__checkpoint": str(student)}, "student.checkpoint: "),
    ):
        config = runs.distill_config(fixtures, taught, teacher, **changes)
        assert main(["distill", "--config", runs.write_config(config), "--check-world=1"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if said in line]
        assert len(lines) == 1 and "was started with" in lines[0], changes


def test_what_has_moved_is_the_same(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, taught: Path, tmp_path: Path, capsys: Any
) -> None:
    """The teacher and the data, and the run itself, may lie elsewhere at the next start; it says what has changed."""
    moved = {name: tmp_path / name for name in ("teacher", "run", "data")}
    shutil.copytree(teacher, moved["teacher"])
    shutil.copytree(taught, moved["run"])
    moved["data"].mkdir()
    (prefix,) = fixtures.data["train"]
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", moved["data"])
    changes = {"data__train": [str(moved["data"] / Path(prefix).name)], "optimizer__lr": 0.5, "train__steps": 3}
    config = runs.distill_config(fixtures, moved["run"], moved["teacher"], **changes)
    (rank,) = runs.run_stage(pool, "distill", config)
    assert rank.value == 0, rank
    assert "optimizer.lr 0.003 -> 0.5" in rank.stdout and "run_dir" in rank.stdout
    assert [step["step"] for step in runs.steps_of(moved["run"])] == [1, 2, 3]


def test_a_finished_run_is_left_as_it_is(pool: WorkerPool, fixtures: Fixtures, teacher: Path, taught: Path) -> None:
    before = runs.files_of(taught)
    runs.train(pool, "distill", runs.distill_config(fixtures, taught, teacher, train__steps=2, optimizer__lr=0.5))
    after = runs.files_of(taught)
    kept = {name for name in before if "tensorboard" not in name and "data_cache" not in name}
    assert {"resolved.yaml", "record.json", "metrics.jsonl"} <= kept
    assert {name for name in kept if after[name] != before[name]} == set()


def test_the_record_of_a_shorter_run_does_not_stay(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, taught: Path, tmp_path: Path
) -> None:
    """The longer run is stopped after its last save, before it has left a record."""
    run_dir = tmp_path / "run"
    shutil.copytree(taught, run_dir)
    shorter = (run_dir / "record.json").read_bytes()
    longer = runs.distill_config(fixtures, run_dir, teacher, train__steps=3)
    runs.train(pool, "distill", longer)
    wanted = (run_dir / "record.json").read_bytes()
    (run_dir / "record.json").write_bytes(shorter)
    runs.train(pool, "distill", longer)
    assert (run_dir / "record.json").read_bytes() == wanted != shorter
