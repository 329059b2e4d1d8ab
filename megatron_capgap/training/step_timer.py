"""Where the time of a step goes: which rank the others wait for, and what reading takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config

from megatron_capgap.devices import Device


class StepTimer:
    """A rank's clock; ranks compare theirs when a line is to be said, in one all-gather of two numbers.

    What counts is a rank's way from the beginning of a step to the reduction of gradients, where data-parallel replicas
    meet: a slow node is late there. Ranks of one replica wait for each other before, in tensor and pipeline
    parallelism, and are late together.

    Args:
        chunks: this rank's model chunks; their gradients' reduction is watched from here on.
        device: of the run.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], device: Device) -> None:
        self._device = device
        self._began = self._read = self._arrived = time.perf_counter()
        config = get_model_config(chunks[0])
        reduce = config.finalize_model_grads_func

        def arrive(*arguments: Any, **options: Any) -> Any:
            device.finish()
            self._arrived = time.perf_counter()
            return reduce(*arguments, **options)

        config.finalize_model_grads_func = arrive

    def start(self) -> None:
        """A step begins, with the reading of its batch."""
        self._began = time.perf_counter()

    def data_loaded(self) -> None:
        """This rank's part of the global batch is there."""
        self._read = time.perf_counter()

    def summary(self) -> str:
        """The last step of all ranks in words. Collective."""
        times = [self._arrived - self._began, self._read - self._began]
        mine = torch.tensor(times, dtype=torch.float64, device=self._device.torch_device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
        return as_text([(way, reading) for way, reading in torch.stack(found).tolist()])


def as_text(times: Sequence[tuple[float, float]]) -> str:
    """Names the slowest rank where there are several, and the share of its own time that the worst reader read.

    Args:
        times: of each rank, the seconds from a step's beginning to the reduction of gradients, and those of reading.
    """
    ways = [way for way, _ in times]
    slowest = max(range(len(ways)), key=ways.__getitem__)
    data = max(reading / max(way, 1e-9) for way, reading in times)
    spread = f"slowest rank {slowest} {ways[slowest] / max(min(ways), 1e-9):.2f}x of the fastest  "
    return f"{spread if len(ways) > 1 else ''}data {data:.0%}"
