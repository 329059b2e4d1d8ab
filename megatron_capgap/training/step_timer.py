"""Step timing: reports the slowest rank (straggler), the share of time spent on waiting for data, the peak memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_capgap.devices import Device


class RankTimes(NamedTuple):
    """What a rank tells of its step before."""

    to_reduction: float
    """Seconds from the step's start to the reduction of gradients."""
    waiting: float
    """Seconds of them spent on waiting for data."""
    peak_memory: float
    """Peak bytes of the rank since it started, as of now."""


class StepTimer:
    """Times one rank's steps.

    The measured time is from the start of a step to the reduction of gradients, where data-parallel replicas wait for
    each other: a slow node arrives late there. Ranks of one replica already wait for each other in tensor and pipeline
    parallelism, so they arrive late together. It is measured on the device, whose work the process submits ahead of
    time, and known once the device has reached that point: so the ranks exchange the times of the step before.

    Args:
        device: of the run.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: tuple[Any, Any] | None = None  # of the last step: its start, its arrival at the reduction
        self._began = device.mark()
        self._started, self._waited = time.perf_counter(), 0.0
        self._last = (0.0, 0.0)
        self._of_ranks: list[RankTimes] = []
        self.peak_memory = 0
        """Peak bytes of the rank that uses most, as of the last exchange."""

    def start(self) -> None:
        """Marks the start of a step, which begins with its batch."""
        if self._marks is not None:
            self._last = (self._device.seconds_between(*self._marks), self._waited)
        self._began, self._started = self._device.mark(), time.perf_counter()

    def data_loaded(self) -> None:
        """Marks the arrival of this rank's part of the global batch."""
        self._waited = time.perf_counter() - self._started

    def arrived(self) -> None:
        """Marks the end of the last backward pass."""
        self._marks = (self._began, self._device.mark())

    def last_times(self) -> RankTimes:
        """This rank's times of the step before, which are zeros in the first step of a process, and its peak memory."""
        return RankTimes(*self._last, self._device.peak_memory())

    def receive(self, times: list[RankTimes]) -> None:
        """Takes the times of all ranks; empty if this step did not exchange them."""
        self._of_ranks = times
        if times:
            self.peak_memory = int(max(rank.peak_memory for rank in times))

    def summary(self) -> str:
        """One phrase about the step before, of all ranks; "" in the first step of a process."""
        return as_text(self._of_ranks) if any(rank.to_reduction for rank in self._of_ranks) else ""


def as_text(times: Sequence[RankTimes]) -> str:
    """Names the slowest rank if there are several, and the largest share of a rank's time spent on waiting for data.

    Args:
        times: of each rank.
    """
    ways = [rank.to_reduction for rank in times]
    slowest = max(range(len(ways)), key=ways.__getitem__)
    data = max(rank.waiting / max(rank.to_reduction, 1e-9) for rank in times)
    spread = f"slowest rank {slowest} {ways[slowest] / max(min(ways), 1e-9):.2f}x of the fastest  "
    return f"{spread if len(ways) > 1 else ''}data {data:.0%}"
