"""Stop requests: SIGTERM, SIGUSR1 or the time limit save and stop the run on all ranks, after this step or the next
one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch

from megatron_capgap.distributed.collectives import all_reduce_max

_Handler = Callable[[int, FrameType | None], Any] | int | None
"""What Python may answer for the handler of a signal."""
WATCHED = (signal.SIGTERM, signal.SIGUSR1)
_TIME_IS_UP = 1
"""Represents the time limit in the all-reduce; smaller than the watched signals' numbers."""
_REQUESTS = sorted((_TIME_IS_UP, *WATCHED))


class StopRequest:
    """Records a signal; a context manager around the training loop.

    Args:
        device: device of the default process group's tensors.
        reduce_max: maximum of a number over all ranks, if there are more than in the default group. Collective.
        deadline: `time.monotonic` at which to stop without a signal; each rank has its own clock.
    """

    def __init__(
        self, device: torch.device, reduce_max: Callable[[int], int] | None = None, deadline: float | None = None
    ) -> None:
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
        self.seen = number

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
        name = signal.Signals(number).name if number > _TIME_IS_UP else None
        self.reason = "train.exit_after_minutes" if number == _TIME_IS_UP else name
        return self.reason

    def _time_is_up(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline
