"""One job at a time in a run directory: who is refused, and whose place is taken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.common.errors import UserError
from megatron_capgap.runtime import run_lock
from megatron_capgap.runtime.run_lock import RunLock


def left_by(run_dir: Path, **changes: Any) -> Path:
    """A lock file of this process, changed into another's."""
    file = run_dir / run_lock.LOCK_FILE
    file.write_text(json.dumps({**run_lock._this_job(), **changes}))
    return file


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_second_is_refused_in_one_line_and_the_first_goes_on(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire() is None
    with pytest.raises(UserError) as refusal:
        second.acquire()
    assert "\n" not in str(refusal.value)
    assert f"run_dir: {tmp_path} is in use by process {os.getpid()} on" in str(refusal.value)
    second.release()
    first.check_ownership()
    first.release()
    assert list(tmp_path.iterdir()) == []
    assert second.acquire() is None
    second.release()


@pytest.mark.parametrize("what", ["its process has ended", "its number went to another process"])
def test_the_place_of_a_dead_job_of_this_machine_is_taken(tmp_path: Path, what: str) -> None:
    changes = {"pid": ended_process()} if "ended" in what else {"pid": os.getppid(), "started": 1.0}
    left_by(tmp_path, **changes)
    mine = RunLock(tmp_path)
    said = mine.acquire()
    assert said is not None and f"was in use by process {changes['pid']} on" in said and "has died" in said
    mine.check_ownership()
    mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("elsewhere", [{"host": "node17"}, {"pids": "pid:[1]"}], ids=["host", "container"])
def test_a_job_elsewhere_is_alive_as_long_as_it_touches_its_file(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    file = left_by(tmp_path, pid=ended_process(), job="4711", **elsewhere)
    with pytest.raises(UserError, match=r"is in use by process \d+ on .* of SLURM job 4711 since"):
        RunLock(tmp_path).acquire()
    assert [file] == list(tmp_path.iterdir())
    old = time.time() - run_lock.STALE_SECONDS - 5
    os.utime(file, (old, old))
    mine = RunLock(tmp_path)
    assert "which was last seen 18" in str(mine.acquire())
    mine.release()


def test_a_requeued_slurm_job_takes_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    left_by(tmp_path, host="node17")
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path).acquire()  # another step of this very start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    mine = RunLock(tmp_path)
    assert "an earlier start of this SLURM job" in str(mine.acquire())
    mine.release()


def test_an_unfinished_file_is_a_job_that_begins_until_it_is_old(tmp_path: Path) -> None:
    file = tmp_path / run_lock.LOCK_FILE
    file.touch()
    with pytest.raises(UserError, match="in use by a job that has just started"):
        RunLock(tmp_path).acquire()
    os.utime(file, (1.0, 1.0))
    mine = RunLock(tmp_path)
    assert mine.acquire() is not None
    mine.release()


def test_who_has_lost_its_place_is_told_and_leaves_it_alone(tmp_path: Path) -> None:
    slept, awake = RunLock(tmp_path), RunLock(tmp_path)
    slept.acquire()
    left_by(tmp_path, host="node17", pid=1)
    with pytest.raises(UserError, match=r"process 1 on node17 since .* has taken this run directory"):
        slept.check_ownership()
    slept.release()
    assert (tmp_path / run_lock.LOCK_FILE).is_file()
    with pytest.raises(UserError, match="in use"):
        awake.acquire()


def test_the_file_is_touched_while_the_job_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    mine = RunLock(tmp_path)
    mine.acquire()
    file = tmp_path / run_lock.LOCK_FILE
    os.utime(file, (1.0, 1.0))
    deadline = time.monotonic() + 20
    while file.stat().st_mtime == 1.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mine.release()
    assert not file.exists()


def test_of_many_that_find_a_dead_job_one_gets_its_place(tmp_path: Path) -> None:
    left_by(tmp_path, pid=ended_process())
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megatron_capgap.common.errors import UserError\n"
        "from megatron_capgap.runtime.run_lock import RunLock\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    RunLock(Path(sys.argv[1])).acquire()\n"
        "except UserError:\n"
        "    print('refused', flush=True)\n"
        "else:\n"
        "    print('taken', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    jobs = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(6)
    ]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("go\n")
    answers = sorted(job.stdout.readline().strip() for job in jobs)
    for job in jobs:
        job.communicate("end\n")
    assert answers == ["refused"] * 5 + ["taken"]


def test_who_is_late_to_a_dead_job_s_place_leaves_the_new_one_s_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading the dead one's file and removing it, another job has taken the place."""
    file, unlink, rename = left_by(tmp_path, pid=ended_process()), Path.unlink, Path.rename
    late, early = RunLock(tmp_path), RunLock(tmp_path)
    why = late._why_stale

    def meanwhile(found: dict[str, Any]) -> str | None:
        monkeypatch.setattr(late, "_why_stale", why)
        said = why(found)
        early.acquire()
        for name, act in (("unlink", unlink), ("rename", rename)):
            monkeypatch.setattr(Path, name, lambda self, *rest, act=act, **more: taken.append(self) or act(self, *rest))
        return said

    taken: list[Path] = []
    monkeypatch.setattr(late, "_why_stale", meanwhile)
    with pytest.raises(UserError, match=r"another job, started at the same time, has taken .* over from process"):
        late.acquire()
    assert taken and file not in taken
    early.check_ownership()
    early.release()


def test_a_turn_of_one_that_died_in_it_passes(tmp_path: Path) -> None:
    left_by(tmp_path, pid=ended_process())
    turn = tmp_path / f".{run_lock.LOCK_FILE}.turn"
    turn.touch()
    with pytest.raises(UserError, match="started at the same time"):
        RunLock(tmp_path).acquire()
    os.utime(turn, (1.0, 1.0))
    mine = RunLock(tmp_path)
    assert "has died" in str(mine.acquire())
    mine.release()
    assert list(tmp_path.iterdir()) == []
