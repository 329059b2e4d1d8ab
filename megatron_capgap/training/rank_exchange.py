"""What the ranks tell each other once per step: requests to stop, the times of the step before, their peak memory.

All of it is one vector, summed over the ranks; `training.step` reads it from the device together with the losses, so
that a step waits for the device once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.devices import Device
from megatron_capgap.distributed.signals import StopRequest
from megatron_capgap.training.step_timer import RankTimes, StepTimer

_NUMBERS = len(RankTimes._fields)


class RankExchange:
    """The exchange of one run.

    Args:
        stop: this rank's request to stop; receives that of all ranks.
        timer: this rank's times; receives those of all ranks.
        device: of the run.
    """

    def __init__(self, stop: StopRequest, timer: StepTimer, device: Device) -> None:
        self._stop, self._timer, self._device = stop, timer, device
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._with_times, self._first = False, True

    def start(self, *, with_times: bool) -> None:
        """Begins a step.

        Args:
            with_times: whether its exchange includes the times of all ranks; the same on all ranks. The first one does,
                so that the peak memory is known from then on.
        """
        self._with_times, self._first = with_times or self._first, False

    def sums(self) -> Tensor:
        """This step's vector, fp64, summed over all ranks of the default group. Collective."""
        requests = self._stop.request_counts()
        times = [0.0] * (_NUMBERS * self._ranks if self._with_times else 0)
        if times:
            times[_NUMBERS * self._rank : _NUMBERS * (self._rank + 1)] = self._timer.last_times()
        vector = self._device.upload(torch.tensor([*requests, *times], dtype=torch.float64))
        dist.all_reduce(vector)
        return vector

    def receive(self, numbers: Sequence[float]) -> None:
        """Takes what was read of `sums`."""
        requests = len(self._stop.request_counts())
        self._stop.receive(numbers[:requests])
        times = numbers[requests:]
        self._timer.receive([RankTimes(*times[at : at + _NUMBERS]) for at in range(0, len(times), _NUMBERS)])
