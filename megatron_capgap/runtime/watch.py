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

from megatron_capgap.config.errors import in_one_line

BEAT_SECONDS = 5.0
"""Between two words of a rank, at most; a twentieth of the time-out where that is less. A rank that has waited in vain
stays for ten of them at most: to ask twice, to listen in between, and on the first rank to be asked."""
SILENT_SECONDS = 60.0
"""After so long without a word of a rank the first one says so, though all may still wait for it."""
_NAMED = 4
_VERDICT = "lost"
_UNDERNEATH = ("/torch/", "/typing_extensions.py")  # the latter wraps what torch calls deprecated
_TRANSPORT = re.compile("gloo|nccl|c10d|tcpstore|connection", re.IGNORECASE)


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    rank: int
    host: str
    count: int
    """How often it has spoken."""
    place: str
    """What it was doing."""
    awaits: str = ""
    """What it waited for that no collective has in its name; empty for nothing."""

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        return f"rank {self.rank}{where}, last heard of in {self.place}" if self.place else f"rank {self.rank}"


class Watch:
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
        self._beat = min(BEAT_SECONDS, timeout_seconds / 20)
        self._silent = min(SILENT_SECONDS, timeout_seconds / 2)
        self._count = 0
        # Of the first rank that noticed: those that notice later may see nothing but their peers leave.
        self._verdict: str | None = None
        self._end = threading.Event()
        self.place = "start-up"
        """What this rank is doing, in words that follow "in"."""
        self._awaits = ""
        if world > 1:
            threading.Thread(target=self._speak, daemon=True, name="watch").start()

    def end(self) -> None:
        """Nothing is said any more."""
        self._end.set()

    def waits_for(self, what: str) -> None:
        """Notes what this rank waits for from now on, where a collective's name does not say it; "" for nothing."""
        self._awaits = what

    @property
    def verdict(self) -> str | None:
        """Which rank was lost, and what was waited for, in the words of the rank that noticed first; else None."""
        return self._verdict

    def explain(self, error: BaseException) -> None:
        """Says on stderr which rank was lost, where an error is that of waiting for one; takes a few seconds.

        Ranks that are killed or stand still do not speak any more. Where all speak, the one that is elsewhere is named.
        All ranks hear what the first one found: some may see nothing but that it leaves, some nothing at all.
        """
        waited = self._awaits if isinstance(error, RuntimeError) and self._awaits else waiting_in(error)
        if self._world == 1 or not (waited or self._verdict):
            return
        if waited:
            self._say_so(waited, error)
        if self._rank == 0:  # the store goes with this process: the others can still ask, and hear the verdict
            self._end.wait(2.5 * self._beat)

    def _say_so(self, waited: str, error: BaseException) -> None:
        who = f"rank {self._rank} on {socket.gethostname()} waited in {waited} ({self.place})"
        root = error.__cause__ or error
        what = re.sub(r"^\[[^]]*\] *", "", in_one_line(root))[:120]  # without the line of a library's source
        verdict = self._verdict or self.lost()
        if not self._verdict:  # whoever may still be waiting must end too, also where no rank is silent
            self._tell(verdict)
        _say(f"error: {who}: {what}; {verdict}")

    def lost(self) -> str:
        """The ranks that do not speak any more, in words; looks for two and a half times as long as one is silent."""
        before = self._answer()
        self._end.wait(2.5 * self._beat)
        after = self._answer()
        if self._verdict:
            return self._verdict
        if before is None or after is None:
            return "rank 0, in whose process the job's store lives, does not answer: it is gone or stands still"
        silent = [new for old, new in zip(before, after, strict=True) if new.count == old.count]
        silent = [beat for beat in silent if beat.rank != self._rank]
        elsewhere = [beat for beat in after if beat.place != self.place]
        if silent:
            verdict = f"{_listed(silent)}: gone or standing still"
        elif elsewhere:
            verdict = f"all ranks are alive; elsewhere: {_listed(elsewhere)}"
        else:
            verdict = f"all ranks are alive and in {self.place}"
        waits = [f"rank {beat.rank} waits for {beat.awaits}" for beat in after if beat.awaits and beat not in silent]
        verdict = "; ".join([verdict, *waits[:_NAMED]])
        if silent:
            self._tell(verdict)
        return verdict

    def _tell(self, verdict: str) -> None:
        """As in `_answer`: a store that stands still would keep this rank for good."""

        def tell() -> None:
            with suppress(RuntimeError):  # the store may have gone with the first rank
                self._store.set(_VERDICT, verdict)

        _for_at_most(self._beat, tell)

    def _answer(self) -> list[Beat] | None:
        """As `_heard`, for a store in a process that stands still never answers."""
        heard: list[list[Beat] | None] = []
        _for_at_most(2.5 * self._beat, lambda: heard.append(self._heard()))
        return heard[0] if heard else None

    def _speak(self) -> None:
        """The thread's work: to speak, and on the first rank to listen."""
        silent: dict[int, tuple[int, float, bool]] = {}
        while not self._end.wait(self._beat if self._count else 0):
            self._count += 1
            try:
                word = [socket.gethostname(), self._count, self.place, self._awaits]
                self._store.set(str(self._rank), json.dumps(word))
                if not self._verdict and self._store.check([_VERDICT]):
                    self._verdict = self._store.get(_VERDICT).decode()
            except RuntimeError:  # the store went with the first rank
                return
            if self._rank == 0:
                self._listen(silent)

    def _listen(self, silent: dict[int, tuple[int, float, bool]]) -> None:
        """Says which ranks have been silent for long, each once.

        Args:
            silent: of each rank the last count, when it came, and whether its silence was told; is brought up to date.
        """
        now, late = time.monotonic(), []
        for beat in self._heard() or []:
            count, since, told = silent.get(beat.rank, (-1, now, False))
            if beat.count != count:
                since, told = now, False
            elif now - since > self._silent and not told:
                late.append(beat)
                told = True
            silent[beat.rank] = (beat.count, since, told)
        if late:
            _say(f"warning: {_listed(late)}: no word for {self._silent:.0f} s")

    def _heard(self) -> list[Beat] | None:
        """What each rank last said; None where the store cannot be asked."""
        try:
            keys = [str(rank) for rank in range(self._world)]
            if self._store.check(keys):
                words = self._store.multi_get(keys)
            else:  # some have not begun yet
                words = [self._store.get(key) if self._store.check([key]) else b'["", 0, ""]' for key in keys]
        except RuntimeError:
            return None
        return [Beat(rank, *json.loads(word)) for rank, word in enumerate(words)]


def waiting_in(error: BaseException) -> str | None:
    """The collective in which an error was raised, and who called it; None for an error of another kind."""
    if not isinstance(error, RuntimeError) or not _TRANSPORT.search(str(error)):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.name for frame in frames if "/torch/distributed/" in frame.filename]
    callers = [frame for frame in frames if not any(part in frame.filename for part in _UNDERNEATH)]
    if not callers:
        return inside[-1] if inside else "a collective"
    # What is called in C++ has no frame of its own.
    return f"{inside[-1] if inside else f'`{callers[-1].line}`'}, called by {_place(callers[-1])}"


def _place(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    return f"{frame.name} ({path.parent.name}/{path.name}:{frame.lineno})"


def _listed(beats: Iterable[Beat]) -> str:
    words = [str(beat) for beat in beats]
    return "; ".join(words[:_NAMED]) + (f"; and {len(words) - _NAMED} more" if len(words) > _NAMED else "")


def _for_at_most(seconds: float, work: Callable[[], None]) -> None:
    """Waits no longer for what may never come back."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _say(line: str) -> None:
    sys.stderr.write(f"capgap: {line}\n")
    sys.stderr.flush()
