"""Run lock: one job at a time in a run directory, by a lock file with its owner and a heartbeat (modification time)."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_capgap.common.errors import UserError

LOCK_FILE = "in_use.json"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 180.0
"""A lock of another machine is stale if its file has not been touched for this long; network file systems update times
with delay."""


class RunLock:
    """Exclusive right to write into a run directory; taken by `acquire`.

    The lock is a file that is created exclusively, which is reliable on NFS version 3 and later; `flock` locks may be
    local to one machine there. A thread touches the file every 15 seconds.

    Args:
        run_dir: the run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        self._mine: dict[str, Any] | None = None
        self._end = threading.Event()

    def acquire(self) -> str | None:
        """Takes the lock; the run directory must exist.

        Returns:
            A warning if the lock was taken over from a dead job.

        Raises:
            UserError: another job holds the lock.
            OSError: the file cannot be written.
        """
        warning = None
        try:
            self._create()
        except FileExistsError:
            warning = self._take_over()
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()
        return warning

    def check_ownership(self) -> None:
        """Checks that this job still holds the lock.

        Raises:
            UserError: another job has taken over the lock, because this job seemed dead.
        """
        assert self._mine is not None
        found = _read(self._path)
        if found != self._mine:
            raise UserError(
                f"{self._path}: {_describe_owner(found)} has taken this run directory while this job was suspended or "
                "its disk unavailable; this job stops without saving"
            )

    def release(self) -> None:
        """Releases the lock; does nothing if it is not held."""
        self._end.set()
        if self._mine is not None and _read(self._path) == self._mine:
            with suppress(OSError):
                self._path.unlink()
        self._mine = None

    def _create(self) -> None:
        mine = _this_job()
        with open(self._path, "x") as file:
            try:
                json.dump(mine, file)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                self._path.unlink()
                raise
        self._mine = mine

    def _take_over(self) -> str:
        found = _read(self._path)
        why = self._why_stale(found)
        if why is None:
            raise UserError(
                f"run_dir: {self._path.parent} is in use by {_describe_owner(found)}; wait for it, stop it, or choose "
                f"another run_dir (if it is certainly dead, remove {self._path})"
            )
        # One job at a time removes a stale lock, after checking it again: another job may have replaced it meanwhile.
        turn = self._path.with_name(f".{LOCK_FILE}.turn")
        with suppress(FileNotFoundError):
            if self._age(turn) > STALE_SECONDS:  # its owner died within these lines
                turn.unlink()
        try:
            turn.open("x").close()
            try:
                if self._why_stale(_read(self._path)) is not None:
                    self._path.unlink(missing_ok=True)
                self._create()
            finally:
                turn.unlink()
        except FileExistsError:
            raise UserError(
                f"run_dir: another job, started at the same time, has taken {self._path.parent} over from "
                f"{_describe_owner(found)}; choose another run_dir"
            ) from None
        return f"{self._path.parent} was in use by {_describe_owner(found)}, {why}; this job takes over"

    def _why_stale(self, found: dict[str, Any]) -> str | None:
        """Why the lock's owner is dead; None if it may be alive."""
        me = _this_job()
        if me["job"] and found.get("job") == me["job"] and found.get("restart") != me["restart"]:
            return "an earlier start of this SLURM job"
        if (found.get("host"), found.get("pids")) == (me["host"], me["pids"]):
            return None if _is_alive(found) else "which has died"
        with suppress(FileNotFoundError):
            age = self._age(self._path)
            return f"which was last seen {age:.0f} s ago" if age > STALE_SECONDS else None
        return "which has just ended"

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the file system's clock, which may differ from this machine's."""
        probe = self._path.with_name(f".{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}.time")
        probe.touch()
        try:
            return probe.stat().st_mtime - path.stat().st_mtime
        finally:
            probe.unlink()

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_SECONDS):
            if _read(self._path) == self._mine:
                with suppress(OSError):  # file server temporarily unavailable; `check_ownership` detects a lost lock
                    os.utime(self._path)


def _this_job() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": psutil.Process().create_time(),
        "pids": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _read(path: Path) -> dict[str, Any]:
    """Content of a lock file; empty if it does not exist or is incomplete."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe_owner(found: dict[str, Any]) -> str:
    if not found:
        return "a job that has just started"
    job = f" of SLURM job {found['job']}" if found.get("job") else ""
    return f"process {found.get('pid')} on {found.get('host')}{job} since {found.get('since')}"


def _is_alive(found: dict[str, Any]) -> bool:
    """Whether the owner's process exists, and its PID has not been reused."""
    try:
        process = psutil.Process(int(found["pid"]))
        same = abs(process.create_time() - float(found["started"])) < 5.0
        return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except (KeyError, TypeError, ValueError, psutil.Error):
        return True
