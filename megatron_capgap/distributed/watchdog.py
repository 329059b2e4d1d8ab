"""Heartbeat watchdog: reports which rank died or stalled when a collective fails."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_capgap.common.errors import in_one_line
from megatron_capgap.common.log import LOG

HEARTBEAT_SECONDS = 5.0
"""Maximum interval between heartbeats of a rank; a twentieth of the time-out if that is less. After a failed collective
a rank stays for at most ten intervals: to read all heartbeats twice, to wait in between, and on rank 0 to serve the
store."""
SILENT_SECONDS = 60.0
"""Rank 0 warns about a rank without a heartbeat for this long, even if no collective has failed yet."""
_MAX_LISTED = 4
_DIAGNOSIS_KEY = "lost"
_LIBRARY_PATHS = ("/torch/", "/typing_extensions.py")  # the latter wraps deprecated functions of torch
_TRANSPORT = re.compile("gloo|nccl|c10d|tcpstore|connection", re.IGNORECASE)


@dataclass(frozen=True)
class Heartbeat:
    """Last heartbeat of a rank."""

    rank: int
    host: str
    count: int
    """Number of heartbeats so far."""
    activity: str
    """What the rank was doing."""
    waiting_for: str = ""
    """What it waited for, if the collective's name does not show it; empty: nothing."""

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        return f"rank {self.rank}{where}, last heartbeat in {self.activity}" if self.activity else f"rank {self.rank}"


class Watchdog:
    """A thread that publishes this rank's heartbeat, over its own connection to the job's store.

    Args:
        store: store of all ranks of the job.
        rank: rank of this process in the job.
        world: number of ranks of the job.
        timeout_seconds: time-out of a collective, in seconds; all intervals here are short in comparison.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_seconds: float) -> None:
        store = dist.PrefixStore("where", store)
        # A clone has its own connection, which is not blocked by other waits on the store.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._rank, self._world = rank, world
        self._beat = min(HEARTBEAT_SECONDS, timeout_seconds / 20)
        self._silent = min(SILENT_SECONDS, timeout_seconds / 2)
        self._count = 0
        # Diagnosis of the first rank that noticed: later ranks may only see their peers exit.
        self._verdict: str | None = None
        self._end = threading.Event()
        self.activity = "start-up"
        """What this rank is doing, in words that follow "in"."""
        self._awaits = ""
        if world > 1:
            threading.Thread(target=self._run, daemon=True, name="watch").start()

    def stop(self) -> None:
        """Stops the heartbeat."""
        self._end.set()

    def set_waiting_for(self, what: str) -> None:
        """Sets what this rank waits for, if the collective's name does not show it; "" for nothing."""
        self._awaits = what

    @property
    def diagnosis(self) -> str | None:
        """Which rank failed and what waited for it, as published by the first rank that noticed; None if no rank
        did."""
        return self._verdict

    def report(self, error: BaseException) -> None:
        """Prints to stderr which rank failed, if `error` is that of a failed collective; takes a few seconds.

        Killed or stalled ranks have no heartbeat. If all ranks have one, ranks with a different activity are named. All
        ranks receive the first diagnosis: some only see other ranks exit, some see nothing.
        """
        waited = self._awaits if isinstance(error, RuntimeError) and self._awaits else failed_collective(error)
        if self._world == 1 or not (waited or self._verdict):
            return
        if waited:
            self._report(waited, error)
        if self._rank == 0:  # the store ends with this process: other ranks still need it to read the diagnosis
            self._end.wait(2.5 * self._beat)

    def _report(self, waited: str, error: BaseException) -> None:
        who = f"rank {self._rank} on {socket.gethostname()} waited in {waited} ({self.activity})"
        root = error.__cause__ or error
        what = re.sub(r"^\[[^]]*\] *", "", in_one_line(root))[:120]  # without the library's source location
        verdict = self._verdict or self.diagnose()
        if not self._verdict:  # ranks that still wait must exit too, even if all ranks are alive
            self._publish(verdict)
        LOG.error(f"{who}: {what}; {verdict}")

    def diagnose(self) -> str:
        """Ranks without a heartbeat, in words; observes heartbeats for two and a half intervals."""
        before = self._try_read_heartbeats()
        self._end.wait(2.5 * self._beat)
        after = self._try_read_heartbeats()
        if self._verdict:
            return self._verdict
        if before is None or after is None:
            return "rank 0, which hosts the job's store, does not respond: dead or stalled"
        silent = [new for old, new in zip(before, after, strict=True) if new.count == old.count]
        silent = [beat for beat in silent if beat.rank != self._rank]
        elsewhere = [beat for beat in after if beat.activity != self.activity]
        if silent:
            verdict = f"{_listed(silent)}: dead or stalled"
        elif elsewhere:
            verdict = f"all ranks are alive; not in the same activity: {_listed(elsewhere)}"
        else:
            verdict = f"all ranks are alive and in {self.activity}"
        waits = [
            f"rank {beat.rank} waits for {beat.waiting_for}"
            for beat in after
            if beat.waiting_for and beat not in silent
        ]
        verdict = "; ".join([verdict, *waits[:_MAX_LISTED]])
        if silent:
            self._publish(verdict)
        return verdict

    def _publish(self, verdict: str) -> None:
        """Writes the diagnosis to the store, with a time-out: a stalled store would block this rank."""

        def tell() -> None:
            with suppress(RuntimeError):  # the store ends with rank 0
                self._store.set(_DIAGNOSIS_KEY, verdict)

        _run_with_timeout(self._beat, tell)

    def _try_read_heartbeats(self) -> list[Heartbeat] | None:
        """`_read_heartbeats` with a time-out: a stalled store never responds."""
        heard: list[list[Heartbeat] | None] = []
        _run_with_timeout(2.5 * self._beat, lambda: heard.append(self._read_heartbeats()))
        return heard[0] if heard else None

    def _run(self) -> None:
        """Thread: publishes heartbeats; on rank 0 also checks those of other ranks."""
        silent: dict[int, tuple[int, float, bool]] = {}
        while not self._end.wait(self._beat if self._count else 0):
            self._count += 1
            try:
                word = [socket.gethostname(), self._count, self.activity, self._awaits]
                self._store.set(str(self._rank), json.dumps(word))
                if not self._verdict and self._store.check([_DIAGNOSIS_KEY]):
                    self._verdict = self._store.get(_DIAGNOSIS_KEY).decode()
            except RuntimeError:  # the store ended with rank 0
                return
            if self._rank == 0:
                self._warn_of_silent_ranks(silent)

    def _warn_of_silent_ranks(self, silent: dict[int, tuple[int, float, bool]]) -> None:
        """Warns once about each rank whose heartbeat has been missing for long.

        Args:
            silent: per rank the last count, its time, and whether a warning was printed; updated in place.
        """
        now, late = time.monotonic(), []
        for beat in self._read_heartbeats() or []:
            count, since, warned = silent.get(beat.rank, (-1, now, False))
            if beat.count != count:
                since, warned = now, False
            elif now - since > self._silent and not warned:
                late.append(beat)
                warned = True
            silent[beat.rank] = (beat.count, since, warned)
        if late:
            LOG.warning(f"{_listed(late)}: no heartbeat for {self._silent:.0f} s")

    def _read_heartbeats(self) -> list[Heartbeat] | None:
        """Last heartbeat of each rank; None if the store is unreachable."""
        try:
            keys = [str(rank) for rank in range(self._world)]
            if self._store.check(keys):
                values = self._store.multi_get(keys)
            else:  # some ranks have not started yet
                values = [self._store.get(key) if self._store.check([key]) else b'["", 0, ""]' for key in keys]
        except RuntimeError:
            return None
        return [Heartbeat(rank, *json.loads(value)) for rank, value in enumerate(values)]


def failed_collective(error: BaseException) -> str | None:
    """The collective that raised an error, and its caller; None for other errors."""
    if not isinstance(error, RuntimeError) or not _TRANSPORT.search(str(error)):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.name for frame in frames if "/torch/distributed/" in frame.filename]
    callers = [frame for frame in frames if not any(part in frame.filename for part in _LIBRARY_PATHS)]
    if not callers:
        return inside[-1] if inside else "a collective"
    # C++ functions have no frame.
    return f"{inside[-1] if inside else f'`{callers[-1].line}`'}, called by {_call_site(callers[-1])}"


def _call_site(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    return f"{frame.name} ({path.parent.name}/{path.name}:{frame.lineno})"


def _listed(beats: Iterable[Heartbeat]) -> str:
    names = [str(beat) for beat in beats]
    return "; ".join(names[:_MAX_LISTED]) + (
        f"; and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    )


def _run_with_timeout(seconds: float, work: Callable[[], None]) -> None:
    """Runs `work` in a thread and waits for at most `seconds`."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
