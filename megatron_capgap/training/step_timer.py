"""Step timing: reports the slowest rank (straggler) and the share of time spent on reading data."""

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
    """Times one rank's steps; `summary` compares the ranks with one all-gather of two numbers.

    The measured time is from the start of a step to the reduction of gradients, where data-parallel replicas wait for
    each other: a slow node arrives late there. Ranks of one replica already wait for each other in tensor and pipeline
    parallelism, so they arrive late together.

    Args:
        chunks: this rank's model chunks; hooks on their gradient reduction record its start.
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
        """Marks the start of a step, which begins with reading its batch."""
        self._began = time.perf_counter()

    def data_loaded(self) -> None:
        """Marks the end of reading this rank's part of the global batch."""
        self._read = time.perf_counter()

    def summary(self) -> str:
        """One line about the last step of all ranks. Collective."""
        times = [self._arrived - self._began, self._read - self._began]
        mine = torch.tensor(times, dtype=torch.float64, device=self._device.torch_device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
        return as_text([(way, reading) for way, reading in torch.stack(found).tolist()])


def as_text(times: Sequence[tuple[float, float]]) -> str:
    """Names the slowest rank if there are several, and the largest share of a rank's time spent on reading.

    Args:
        times: per rank, the seconds from a step's start to the reduction of gradients, and the seconds of reading.
    """
    ways = [way for way, _ in times]
    slowest = max(range(len(ways)), key=ways.__getitem__)
    data = max(reading / max(way, 1e-9) for way, reading in times)
    spread = f"slowest rank {slowest} {ways[slowest] / max(min(ways), 1e-9):.2f}x of the fastest  "
    return f"{spread if len(ways) > 1 else ''}data {data:.0%}"
