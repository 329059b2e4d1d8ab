"""SIGTERM and SIGUSR1 mean: save at the next step boundary and stop. All ranks agree on which boundary."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import torch

from megatron_capgap.runtime.launch import largest_in_world

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal; use as a context manager around the loop.

    Args:
        device: where tensors of the default process group live.
        largest: the largest of a number over all ranks, where those are more than the default group's. Collective.
    """

    def __init__(self, device: torch.device, largest: Callable[[int], int] | None = None) -> None:
        self._largest = largest or (lambda number: largest_in_world(number, device))
        self.seen = 0
        """The number of the last signal that this rank has received; 0 for none."""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in WATCHED:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.seen = number

    def agreed(self) -> str | None:
        """The signal that any rank has received, by name, or None. Collective: one all-reduce of one number."""
        number = self._largest(self.seen)
        return signal.Signals(number).name if number else None
