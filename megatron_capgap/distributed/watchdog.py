"""Which rank do the others wait for? Each says every few seconds where it is; when one is lost, the others name it."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_capgap.common.errors import in_one_line

HEARTBEAT_SECONDS = 5.0
"""Between two words of a rank, at most; a twentieth of the time-out where that is less. A rank that has waited in vain
stays for ten of them at most: to ask twice, to listen in between, and on the first rank to be asked."""
SILENT_SECONDS = 60.0
"""After so long without a word of a rank the first one says so, though all may still wait for it."""
_MAX_LISTED = 4
_DIAGNOSIS_KEY = "lost"
_LIBRARY_PATHS = ("/torch/", "/typing_extensions.py")  # the latter wraps what torch calls deprecated
_TRANSPORT = re.compile("gloo|nccl|c10d|tcpstore|connection", re.IGNORECASE)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself."""

    rank: int
    host: str
    count: int
    """How often it has spoken."""
    activity: str
    """What it was doing."""
    waiting_for: str = ""
    """What it waited for that no collective has in its name; empty for nothing."""

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        return f"rank {self.rank}{where}, last heard of in {self.activity}" if self.activity else f"rank {self.rank}"


class Watchdog:
    """A thread that says where this rank is, over a connection to the job's store that nothing else uses.

    Args:
        store: of all ranks of the job.
        rank: of this one among them.
        world: their number.
        timeout_seconds: how long a collective waits; everything here is short beside it.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_seconds: float) -> None:
        store = dist.PrefixStore("where", store)
        # What blocks one connection, as waiting for a rank that begins late, does not block a clone.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._rank, self._world = rank, world
        self._beat = min(HEARTBEAT_SECONDS, timeout_seconds / 20)
        self._silent = min(SILENT_SECONDS, timeout_seconds / 2)
        self._count = 0
        # Of the first rank that noticed: those that notice later may see nothing but their peers leave.
        self._verdict: str | None = None
        self._end = threading.Event()
        self.activity = "start-up"
        """What this rank is doing, in words that follow "in"."""
        self._awaits = ""
        if world > 1:
            threading.Thread(target=self._run, daemon=True, name="watch").start()

    def stop(self) -> None:
        """Nothing is said any more."""
        self._end.set()

    def set_waiting_for(self, what: str) -> None:
        """Notes what this rank waits for from now on, where a collective's name does not say it; "" for nothing."""
        self._awaits = what

    @property
    def diagnosis(self) -> str | None:
        """Which rank was lost, and what was waited for, in the words of the rank that noticed first; else None."""
        return self._verdict

    def report(self, error: BaseException) -> None:
        """Says on stderr which rank was lost, where an error is that of waiting for one; takes a few seconds.

        Ranks that are killed or stand still do not speak any more. Where all speak, the one that is elsewhere is named.
        All ranks hear what the first one found: some may see nothing but that it leaves, some nothing at all.
        """
        waited = self._awaits if isinstance(error, RuntimeError) and self._awaits else failed_collective(error)
        if self._world == 1 or not (waited or self._verdict):
            return
        if waited:
            self._report(waited, error)
        if self._rank == 0:  # the store goes with this process: the others can still ask, and hear the verdict
            self._end.wait(2.5 * self._beat)

    def _report(self, waited: str, error: BaseException) -> None:
        who = f"rank {self._rank} on {socket.gethostname()} waited in {waited} ({self.activity})"
        root = error.__cause__ or error
        what = re.sub(r"^\[[^]]*\] *", "", in_one_line(root))[:120]  # without the line of a library's source
        verdict = self._verdict or self.diagnose()
        if not self._verdict:  # whoever may still be waiting must end too, also where no rank is silent
            self._publish(verdict)
        _print(f"error: {who}: {what}; {verdict}")

    def diagnose(self) -> str:
        """The ranks that do not speak any more, in words; looks for two and a half times as long as one is silent."""
        before = self._try_read_heartbeats()
        self._end.wait(2.5 * self._beat)
        after = self._try_read_heartbeats()
        if self._verdict:
            return self._verdict
        if before is None or after is None:
            return "rank 0, in whose process the job's store lives, does not answer: it is gone or stands still"
        silent = [new for old, new in zip(before, after, strict=True) if new.count == old.count]
        silent = [beat for beat in silent if beat.rank != self._rank]
        elsewhere = [beat for beat in after if beat.activity != self.activity]
        if silent:
            verdict = f"{_listed(silent)}: gone or standing still"
        elif elsewhere:
            verdict = f"all ranks are alive; elsewhere: {_listed(elsewhere)}"
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
        """As in `_answer`: a store that stands still would keep this rank for good."""

        def tell() -> None:
            with suppress(RuntimeError):  # the store may have gone with the first rank
                self._store.set(_DIAGNOSIS_KEY, verdict)

        _run_with_timeout(self._beat, tell)

    def _try_read_heartbeats(self) -> list[Heartbeat] | None:
        """As `_heard`, for a store in a process that stands still never answers."""
        heard: list[list[Heartbeat] | None] = []
        _run_with_timeout(2.5 * self._beat, lambda: heard.append(self._read_heartbeats()))
        return heard[0] if heard else None

    def _run(self) -> None:
        """The thread's work: to speak, and on the first rank to listen."""
        silent: dict[int, tuple[int, float, bool]] = {}
        while not self._end.wait(self._beat if self._count else 0):
            self._count += 1
            try:
                word = [socket.gethostname(), self._count, self.activity, self._awaits]
                self._store.set(str(self._rank), json.dumps(word))
                if not self._verdict and self._store.check([_DIAGNOSIS_KEY]):
                    self._verdict = self._store.get(_DIAGNOSIS_KEY).decode()
            except RuntimeError:  # the store went with the first rank
                return
            if self._rank == 0:
                self._warn_of_silent_ranks(silent)

    def _warn_of_silent_ranks(self, silent: dict[int, tuple[int, float, bool]]) -> None:
        """Says which ranks have been silent for long, each once.

        Args:
            silent: of each rank the last count, when it came, and whether its silence was told; is brought up to date.
        """
        now, late = time.monotonic(), []
        for beat in self._read_heartbeats() or []:
            count, since, told = silent.get(beat.rank, (-1, now, False))
            if beat.count != count:
                since, told = now, False
            elif now - since > self._silent and not told:
                late.append(beat)
                told = True
            silent[beat.rank] = (beat.count, since, told)
        if late:
            _print(f"warning: {_listed(late)}: no word for {self._silent:.0f} s")

    def _read_heartbeats(self) -> list[Heartbeat] | None:
        """What each rank last said; None where the store cannot be asked."""
        try:
            keys = [str(rank) for rank in range(self._world)]
            if self._store.check(keys):
                words = self._store.multi_get(keys)
            else:  # some have not begun yet
                words = [self._store.get(key) if self._store.check([key]) else b'["", 0, ""]' for key in keys]
        except RuntimeError:
            return None
        return [Heartbeat(rank, *json.loads(word)) for rank, word in enumerate(words)]


def failed_collective(error: BaseException) -> str | None:
    """The collective in which an error was raised, and who called it; None for an error of another kind."""
    if not isinstance(error, RuntimeError) or not _TRANSPORT.search(str(error)):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.name for frame in frames if "/torch/distributed/" in frame.filename]
    callers = [frame for frame in frames if not any(part in frame.filename for part in _LIBRARY_PATHS)]
    if not callers:
        return inside[-1] if inside else "a collective"
    # What is called in C++ has no frame of its own.
    return f"{inside[-1] if inside else f'`{callers[-1].line}`'}, called by {_call_site(callers[-1])}"


def _call_site(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    return f"{frame.name} ({path.parent.name}/{path.name}:{frame.lineno})"


def _listed(beats: Iterable[Heartbeat]) -> str:
    words = [str(beat) for beat in beats]
    return "; ".join(words[:_MAX_LISTED]) + (
        f"; and {len(words) - _MAX_LISTED} more" if len(words) > _MAX_LISTED else ""
    )


def _run_with_timeout(seconds: float, work: Callable[[], None]) -> None:
    """Waits no longer for what may never come back."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _print(line: str) -> None:
    sys.stderr.write(f"capgap: {line}\n")
    sys.stderr.flush()
