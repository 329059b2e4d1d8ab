"""Reads the next global batch in a thread while the current one is processed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_capgap.data.batch import MicroBatch


class Prefetcher:
    """This rank's micro-batches of each step, in order, one step ahead.

    Args:
        read: takes the number of a step, counted from 0; returns its micro-batches in host memory.
        upload: starts the copy of a tensor in host memory to the device.
        steps: of the whole run; nothing is read beyond the last one.
    """

    def __init__(
        self,
        read: Callable[[int], Sequence[MicroBatch]],
        upload: Callable[[torch.Tensor], torch.Tensor],
        steps: int,
    ) -> None:
        self._read, self._upload, self._steps = read, upload, steps
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[int, Future[Sequence[MicroBatch]]] | None = None

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step on the device; starts to read those of the next one.

        Raises what `read` raised for this step, so that an error in the data of a later step does not stop this one.
        """
        number, future = self._next or (step, None)
        if future is None or number != step:
            future = self._thread.submit(self._read, step)
        batches = future.result()
        self._next = (step + 1, self._thread.submit(self._read, step + 1)) if step + 1 < self._steps else None
        return [batch.on_device(self._upload) for batch in batches]

    def close(self) -> None:
        """Waits for a read in progress and ends the thread."""
        self._thread.shutdown(cancel_futures=True)
