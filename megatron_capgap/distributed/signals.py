"""Stop requests: SIGTERM, SIGUSR1, Ctrl-C or the time limit save and stop the run on all ranks, after this step or the
next one. A second Ctrl-C ends the process without saving."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_capgap.common.errors import INTERRUPTED
from megatron_capgap.distributed.collectives import all_reduce_max

_Handler = Callable[[int, FrameType | None], Any] | int | None
"""What Python may answer for the handler of a signal."""
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECOND_AFTER_SECONDS = 0.5
"""A terminal and a launcher may both pass on one Ctrl-C; a second one comes later than this."""
_TIME_IS_UP = 1
"""Represents the time limit in the all-reduce; smaller than the watched signals' numbers."""
_REQUESTS = sorted((_TIME_IS_UP, *WATCHED))


class StopRequest:
    """Records a signal; a context manager around the training loop.

    Args:
        device: device of the default process group's tensors.
        reduce_max: maximum of a number over all ranks, if there are more than in the default group. Collective.
        deadline: `time.monotonic` at which to stop without a signal; each rank has its own clock.
        lost: says what is lost if the run ends now, for the message after a second Ctrl-C.
    """

    def __init__(
        self,
        device: torch.device,
        reduce_max: Callable[[int], int] | None = None,
        deadline: float | None = None,
        lost: Callable[[], str] = lambda: "it ends without saving",
    ) -> None:
        self._lost = lost
        self._interrupted: float | None = None  # when Ctrl-C was first seen
        self._deadline, self._device = deadline, device
        self._all_reduce_max = reduce_max or (lambda number: all_reduce_max(number, device))
        self.seen = 0
        """Number of the last signal that this rank received; 0: none."""
        self.reason: str | None = None
        """Last result of `poll_all_ranks`, `poll_default_group` or `receive`."""
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> StopRequest:
        for number in WATCHED:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """The handler of the watched signals.

        Raises:
            KeyboardInterrupt: at a second Ctrl-C.
        """
        self.seen = number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            _say("interrupted: saves after this step or the next one and ends; a second Ctrl-C ends it without saving")
        elif now - self._interrupted > SECOND_AFTER_SECONDS:
            _say(f"interrupted again: {self._lost()}")
            raise KeyboardInterrupt

    def poll_all_ranks(self) -> str | None:
        """Reason to stop: name of a signal that any rank received, or `train.exit_after_minutes`; otherwise None.

        Collective: one all-reduce of one number.
        """
        return self._set_reason(self._all_reduce_max(self._own_request()))

    def poll_default_group(self) -> str | None:
        """As `poll_all_ranks`, between two steps: over the default process group only. Collective."""
        return self._set_reason(all_reduce_max(self._own_request(), self._device))

    def request_counts(self) -> list[float]:
        """This rank's request, as a count of each kind: their sums over all ranks are what `receive` takes."""
        return [float(number == self._own_request()) for number in _REQUESTS]

    def receive(self, counts: Sequence[float]) -> str | None:
        """Sets the reason to stop from the sums of all ranks' `request_counts`; returns it."""
        return self._set_reason(
            max((number for number, count in zip(_REQUESTS, counts, strict=True) if count), default=0)
        )

    def _own_request(self) -> int:
        return self.seen or (_TIME_IS_UP if self._time_is_up() else 0)

    def _set_reason(self, number: int) -> str | None:
        self.reason = reason_of(number)
        return self.reason

    def _time_is_up(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline


def reason_of(number: int) -> str | None:
    """Name of what a rank asked for: a signal's number, that of the time limit, or 0 for nothing."""
    name = signal.Signals(number).name if number > _TIME_IS_UP else None
    return "train.exit_after_minutes" if number == _TIME_IS_UP else name


def exit_code(reason: str | None) -> int:
    """Exit code of a stage that has ended for a reason to stop; None: it is complete.

    After Ctrl-C it is that of an interrupted program, so that a shell script does not go on with its next command.
    """
    return INTERRUPTED if reason == signal.SIGINT.name else 0


def _say(text: str) -> None:
    """Writes one line to stderr on rank 0. Called by a signal's handler, which may have interrupted a write of Python's
    own `sys.stderr`."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        os.write(2, f"capgap: {text}\n".encode())
