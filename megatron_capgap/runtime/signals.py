"""SIGTERM and SIGUSR1 mean: save at the next step boundary and stop. All ranks agree on which boundary."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal; use as a context manager around the loop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in WATCHED:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._seen = number

    def agreed(self) -> str | None:
        """The signal that any rank has received, by name, or None. Collective: one all-reduce of one number."""
        seen = torch.tensor(self._seen, dtype=torch.int32, device=self._device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        number = int(seen)
        return signal.Signals(number).name if number else None
