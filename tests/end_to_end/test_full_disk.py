"""A disk that is really full, and each file of a save that cannot be written: always loud, what was good stays."""

import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_capgap.checkpoint import integrity
from megatron_capgap.cli import main
from megatron_capgap.runtime.logging import RunLogger
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import job, wait_for
from tests.support.runs import Fixtures

CHANGES = {"train__steps": 6, "checkpoint__every": 2, "data__valid": None}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


def at_steps(work: dict[int, partial], words: list[str]) -> int:
    """Runs a command on a rank that does something after some steps, before they are saved."""
    from megatron_capgap.training import loop

    report = loop._log_step

    def report_and_work(run: loop.TrainingRun, done: int, *rest: Any) -> None:
        report(run, done, *rest)
        if done in work and dist.get_rank() == 0:
            work[done]()

    loop._log_step = report_and_work
    try:
        return main(words)
    finally:
        loop._log_step = report


def fill_after(saved: Path, disk: Path) -> None:
    """Fills the disk as soon as a checkpoint is on it."""
    wait_for(saved.exists, 120, f"{saved}")
    fill(disk)


def empty_after(staged: Path, disk: Path) -> None:
    """Empties the disk as soon as a save has been given up."""
    wait_for(lambda: not staged.exists(), 120, f"the end of {staged}")
    empty(disk)


def whole(folder: Path) -> None:
    """Raises where a checkpoint is not."""
    integrity.verify(folder)


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_is_said_and_the_next_save_is_a_good_one(
    pool: WorkerPool, fixtures: Fixtures, small_disk: Path, tmp_path: Path, world: int, beside: bool
) -> None:
    changes = {**CHANGES, "checkpoint__async_save": beside}
    unbroken = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "unbroken", **changes), world)
    run_dir = small_disk / "run"
    words = ["adapt", "--config", runs.write_config(runs.adapt_config(fixtures, run_dir, **changes))]
    staged = run_dir / "checkpoints" / ".step_4.incomplete"
    saved = run_dir / "checkpoints" / "step_2"
    work = {3: partial(fill_after, saved, small_disk), 5: partial(empty_after, staged, small_disk)}
    ranks = pool.run(partial(at_steps, work), words, world=world, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [0] * world, ranks
    warning = next(line for line in ranks[0].stderr.splitlines() if "step 4" in line)
    assert " capgap: warning: step 4 was not saved: " in warning
    assert "No space left on device" in warning
    assert warning.endswith("older checkpoints are unchanged; training continues, the next save tries again")
    assert runs.checkpoints(run_dir) == ["step_2", "step_6"]
    assert runs.metrics(run_dir) == runs.metrics(unbroken)
    for step in (2, 6):
        pool.run(whole, run_dir / "checkpoints" / f"step_{step}", world=world)


def test_a_disk_that_stays_full_ends_the_run_with_an_error_and_a_good_checkpoint(
    pool: WorkerPool, fixtures: Fixtures, small_disk: Path, tmp_path: Path
) -> None:
    unbroken = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "unbroken", **CHANGES))
    run_dir = small_disk / "run"
    words = ["adapt", "--config", runs.write_config(runs.adapt_config(fixtures, run_dir, **CHANGES))]
    (rank,) = pool.run(
        partial(at_steps, {3: partial(fill, small_disk)}), words, world=1, initialise=False, capture=True
    )
    assert rank.value == 2
    lines = rank.stderr.splitlines()
    assert "capgap: warning: step 4 was not saved" in lines[0]
    assert "capgap: error: step 6 was not saved" in lines[-1]
    assert runs.checkpoints(run_dir) == ["step_2"]
    assert (run_dir / "latest").read_text() == "step_2\n"
    pool.run(whole, run_dir / "checkpoints" / "step_2", world=1)
    empty(small_disk)
    assert pool.run(main, words, world=1, initialise=False) == [0]
    assert runs.metrics(run_dir) == runs.metrics(unbroken)


def test_metrics_wait_for_space(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLogger(small_disk, is_rank0=True)
    log.record({"step": 1})
    fill(small_disk)
    for step in range(2, 1000):
        log.record({"step": step, "loss": 1.5})
    assert len((small_disk / "metrics.jsonl").read_text().splitlines()) < 1000
    empty(small_disk)
    log.record({"step": 1000})
    log.close()
    assert [entry["step"] for entry in runs.metrics(small_disk)] == list(range(1, 1001))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{small_disk}/metrics.jsonl: No space left on device; kept in memory until there is space again" in line


def block(name: str, step: int, words: list[str]) -> int:
    """Runs a command in which the saves of one step find a folder where they want to write a file."""
    from megatron_capgap.checkpoint import saver

    fresh = saver._fresh_folder

    def fresh_but_for_one(folder: Path) -> None:
        fresh(folder)
        if folder.name == f".step_{step}.incomplete":
            (folder / name).mkdir(parents=True)

    saver._fresh_folder = fresh_but_for_one
    try:
        return main(words)
    finally:
        saver._fresh_folder = fresh


FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata.tmp", "common.pt", "metadata.json", "contents.json", "capgap.json")


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_written_is_loud_and_latest_stays(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, name: str, beside: bool
) -> None:
    run_dir = tmp_path / "run"
    changes = {**CHANGES, "train__steps": 4, "checkpoint__keep": 1, "checkpoint__async_save": beside}
    words = ["adapt", "--config", runs.write_config(runs.adapt_config(fixtures, run_dir, **changes))]
    ranks = pool.run(partial(block, name, 4), words, world=2, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [2, 2], ranks
    (line,) = ranks[0].stderr.splitlines()
    assert line.startswith("capgap: error: step 4 was not saved: ") and name in line and "Is a directory" in line
    if name.startswith("__"):
        assert f"rank {name[2]} could not write its part" in line
    assert runs.checkpoints(run_dir) == ["step_2"]
    assert (run_dir / "latest").read_text() == "step_2\n"


def limit_size(rank: int, words: list[str]) -> int:
    """Runs a command in which one rank may write no file beyond 100 kB once it has done three steps."""
    import resource

    from megatron_capgap.training import loop

    step, before = loop.student_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def step_and_limit(run: loop.TrainingRun, done: int, *rest: Any) -> Any:
        if done == 3 and dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        return step(run, done, *rest)

    loop.student_step = step_and_limit
    try:
        return main(words)
    finally:
        loop.student_step = step
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow("four ranks train twice")
@pytest.mark.parametrize("rank", range(4))
def test_each_rank_that_finds_no_room_stops_the_save_on_all(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, rank: int
) -> None:
    changes = {**CHANGES, "train__steps": 4, "student__layout": {"tensor": 2, "pipeline": 2}}
    words = ["adapt", "--config", runs.write_config(runs.adapt_config(fixtures, tmp_path / "run", **changes))]
    ranks = pool.run(partial(limit_size, rank), words, world=4, initialise=False, capture=True)
    assert [one.value for one in ranks] == [2] * 4, ranks
    (line,) = ranks[0].stderr.splitlines()
    assert line.startswith("capgap: error: step 4 was not saved: ") and f"rank {rank} could not write its part" in line
    assert runs.checkpoints(tmp_path / "run") == ["step_2"]
    assert (tmp_path / "run" / "latest").read_text() == "step_2\n"


def lose(name: str, size: int | None, words: list[str]) -> int:
    """Runs a command in which a file of step 4 is gone, or short, after a save that reported no error."""
    seal = integrity.write_checksums

    def lose_and_seal(folder: Path, *group: Any) -> None:
        if dist.get_rank() == 0 and folder.name == ".step_4.incomplete":
            (folder / name).unlink() if size is None else os.truncate(folder / name, size)
        dist.barrier()
        seal(folder, *group)

    integrity.write_checksums = lose_and_seal
    try:
        return main(words)
    finally:
        integrity.write_checksums = seal


@pytest.mark.parametrize("size, says", [(None, "missing after writing"), (1000, "1000 bytes after writing")])
def test_a_file_that_got_lost_while_saving_is_seen(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, size: int | None, says: str
) -> None:
    changes = {**CHANGES, "train__steps": 4}
    words = ["adapt", "--config", runs.write_config(runs.adapt_config(fixtures, tmp_path / "run", **changes))]
    ranks = pool.run(partial(lose, "__1_0.distcp", size), words, world=2, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [2, 2], ranks
    assert (
        f"step 4 was not saved: {tmp_path}/run/checkpoints/.step_4.incomplete/__1_0.distcp: {says}" in ranks[0].stderr
    )
    assert (tmp_path / "run" / "latest").read_text() == "step_2\n"


@pytest.mark.slow("the first job has to be at work while the second one starts")
def test_a_second_job_on_a_run_is_refused_and_the_first_goes_on(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path
) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "run", train__steps=5000, data__valid=None)
    words = ["adapt", "--config", runs.write_config(config)]
    with job(words, 1, tmp_path / "job") as first:
        first.wait_until(lambda: len(runs.steps_of(tmp_path / "run")) >= 2)
        ranks = pool.run(main, words, world=2, initialise=False, capture=True)
        assert [rank.value for rank in ranks] == [2, 2]
        (line,) = ranks[0].stderr.splitlines()
        assert f"run_dir: {tmp_path}/run is in use by process {first.ranks[0].pid} on" in line
        first.signal(signal.SIGTERM)
        assert first.wait() == [0], first.stderr()
    assert not (tmp_path / "run" / "in_use.json").exists()
