"""Writes a run's checkpoints atomically, synchronously or asynchronously from a copy of the state."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_capgap.checkpoint import loader, metadata, run_directory, writer
from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed.collectives import run_on_rank0
from megatron_capgap.distributed.parallel_context import ParallelContext

State = Callable[[], ShardedStateDict]
"""Returns the state to write; collective."""


class SaveFailed(UserError):
    """A checkpoint could not be written; older ones and `latest` are unchanged."""


class Saver:
    """Writes the checkpoints of one run. Collective.

    With `async_save`, `start` copies this rank's part to host memory, and a thread gathers the optimizer state and
    writes. Its collectives use process groups of their own, so they cannot interfere with those of training.

    Args:
        run_dir: the run directory.
        keep: number of newest checkpoints to keep.
        async_save: whether training continues while a checkpoint is written.
        timeout_seconds: timeout of the collectives of an asynchronous save.
        on_saved: called with the step and the seconds that its save took, in the training thread: once the checkpoint
            is on disk, or at the first `poll` or `wait` after that.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        *,
        async_save: bool,
        timeout_seconds: int,
        on_saved: Callable[[int, float], None] = lambda step, seconds: None,
    ) -> None:
        self._run_dir, self._keep, self._on_saved = run_dir, keep, on_saved
        timeout = timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if async_save else None
        self._beside = async_save
        self._begun: Future[tuple[int, float]] | None = None

    def start(
        self,
        meta: CheckpointMetadata,
        chunks: Sequence[torch.nn.Module],
        parallel: ParallelContext,
        optimizer: loader.CheckpointableOptimizer,
    ) -> None:
        """Writes one checkpoint, or starts an asynchronous save. Collective; no other save may be in progress.

        Once on disk it becomes the run's latest; on failure all older checkpoints are unchanged.

        Args:
            meta: the checkpoint's metadata.
            chunks: this rank's model chunks.
            parallel: their layout.
            optimizer: optimizer and schedule.

        Raises:
            SaveFailed: a file could not be written; raised on all ranks.
        """
        assert self._begun is None, "one checkpoint at a time"
        began = time.perf_counter()
        staged = self._run_dir / "checkpoints" / f".step_{meta.step}.incomplete"
        try:
            run_on_rank0(lambda: _fresh_folder(staged))
        except UserError as error:
            raise _save_failed(meta, staged, error) from error
        state = loader.training_state(chunks, parallel, optimizer, copied=self._beside)
        if not self._beside:
            self._write(meta, staged, state)
            self._on_saved(meta.step, time.perf_counter() - began)
            return
        self._begun = Future()
        # A daemon thread: a process that must exit does not wait for a lost rank.
        Thread(target=self._write_async, args=(self._begun, began, meta, staged, state), daemon=True).start()

    def wait(self) -> None:
        """Waits for the save in progress, if any.

        Raises:
            SaveFailed: it could not be written; raised on all ranks.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            self._on_saved(*begun.result())

    def poll(self) -> None:
        """Calls `wait` if the save in progress has finished. The ranks may see this at different steps."""
        if self._begun is not None and self._begun.done():
            self.wait()

    def _write_async(
        self, begun: Future[tuple[int, float]], began: float, meta: CheckpointMetadata, staged: Path, state: State
    ) -> None:
        try:
            self._write(meta, staged, state)
        except BaseException as error:  # re-raised in the training thread
            begun.set_exception(error)
        else:
            begun.set_result((meta.step, time.perf_counter() - began))

    def _write(self, meta: CheckpointMetadata, staged: Path, state: State) -> None:
        def finish() -> None:
            metadata.write(meta, staged)
            run_directory.publish(staged, self._run_dir, meta.step, self._keep)

        try:
            writer.write(staged, writer.rank_shards(state(), self._group), self._group)
            run_on_rank0(finish, self._group)
        except UserError as error:
            raise _save_failed(meta, staged, error) from error


def _save_failed(meta: CheckpointMetadata, staged: Path, error: UserError) -> SaveFailed:
    if dist.get_rank() == 0:
        shutil.rmtree(staged, ignore_errors=True)  # the next save may need its space
    return SaveFailed(f"step {meta.step} was not saved: {error}; older checkpoints are unchanged")


def _fresh_folder(folder: Path) -> None:
    """Creates an empty folder to write into; deletes the incomplete folders of killed saves."""
    for stale in folder.parent.glob(".step_*.incomplete"):
        shutil.rmtree(stale)
    folder.mkdir(parents=True)
