"""Reads the next global batch in a thread while the current one is processed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread

import torch

from megatron_capgap.data.batch import MicroBatch

_Batch = Sequence[MicroBatch]


class Prefetcher:
    """This rank's micro-batches of each step, in order, one step ahead.

    Args:
        read: takes the number of a step, counted from 0; returns its micro-batches in host memory.
        upload: starts the copy of a tensor in host memory to the device.
        steps: of the whole run; nothing is read beyond the last one.
    """

    def __init__(
        self, read: Callable[[int], _Batch], upload: Callable[[torch.Tensor], torch.Tensor], steps: int
    ) -> None:
        self._read, self._upload, self._steps = read, upload, steps
        self._next: tuple[int, Future[_Batch]] | None = None

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step on the device; starts to read those of the next one.

        Raises what `read` raised for this step.
        """
        if self._next is None or self._next[0] != step:
            self._start(step)
        assert self._next is not None
        batches = self._next[1].result()
        self._next = None
        if step + 1 < self._steps:
            self._start(step + 1)
        return [batch.on_device(self._upload) for batch in batches]

    def _start(self, step: int) -> None:
        future: Future[_Batch] = Future()
        self._next = (step, future)
        # Not a pool: its threads are joined at exit, where a read that hangs would keep the process alive.
        Thread(target=self._fill, args=(step, future), name="prefetch", daemon=True).start()

    def _fill(self, step: int, future: Future[_Batch]) -> None:
        try:
            future.set_result(self._read(step))
        except BaseException as error:
            future.set_exception(error)
