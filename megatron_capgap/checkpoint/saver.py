"""Writes a run's checkpoints, whole or not at all: while training waits, or beside it from a copy of the state."""

from __future__ import annotations

import shutil
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
"""Describes what is written; collective."""


class SaveFailed(UserError):
    """A checkpoint could not be written; older ones and `latest` are as they were."""


class Saver:
    """Writes the checkpoints of one run. Collective.

    Beside the training means: `begin` copies this rank's part into host memory, and a thread gathers the optimizer's
    state and writes. All that the ranks exchange meanwhile goes over process groups that training does not use, so that
    it cannot be mistaken for theirs.

    Args:
        run_dir: the run's directory.
        keep: number of newest checkpoints that stay on disk.
        async_save: whether training goes on while a checkpoint is written.
        timeout_seconds: how long a rank that writes may wait for the others.
    """

    def __init__(self, run_dir: Path, keep: int, *, async_save: bool, timeout_seconds: int) -> None:
        self._run_dir, self._keep = run_dir, keep
        timeout = timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if async_save else None
        self._beside = async_save
        self._begun: Future[None] | None = None

    def start(
        self,
        meta: CheckpointMetadata,
        chunks: Sequence[torch.nn.Module],
        parallel: ParallelContext,
        optimizer: loader.CheckpointableOptimizer,
    ) -> None:
        """Writes one checkpoint, or begins to. Collective; nothing begun before may be under way.

        When it is on disk it is the run's latest; if that fails, all older ones stay as they were.

        Args:
            meta: what the checkpoint says of itself.
            chunks: this rank's model chunks.
            parallel: their layout.
            optimizer: optimizer and schedule.

        Raises:
            NotSaved: a file could not be written; on every rank alike.
        """
        assert self._begun is None, "one checkpoint at a time"
        staged = self._run_dir / "checkpoints" / f".step_{meta.step}.incomplete"
        try:
            run_on_rank0(lambda: _fresh_folder(staged))
        except UserError as error:
            raise _save_failed(meta, staged, error) from error
        state = loader.training_state(chunks, parallel, optimizer, copied=self._beside)
        if not self._beside:
            self._write(meta, staged, state)
            return
        self._begun = Future()
        # A daemon, for a process that must go at once does not wait for a rank that is lost.
        Thread(target=self._write_async, args=(self._begun, meta, staged, state), daemon=True).start()

    def wait(self) -> None:
        """Waits until what was begun is on disk.

        Raises:
            NotSaved: it could not be written; on every rank alike.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def poll(self) -> None:
        """As `end` where nothing is left to wait for; else nothing. The ranks see it at different steps."""
        if self._begun is not None and self._begun.done():
            self.wait()

    def _write_async(self, begun: Future[None], meta: CheckpointMetadata, staged: Path, state: State) -> None:
        try:
            self._write(meta, staged, state)
        except BaseException as error:  # for the thread that trains, whatever it is
            begun.set_exception(error)
        else:
            begun.set_result(None)

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
        shutil.rmtree(staged, ignore_errors=True)  # its space is what the next save may need
    return SaveFailed(f"step {meta.step} was not saved: {error}; older checkpoints are as they were")


def _fresh_folder(folder: Path) -> None:
    """An empty folder to write into; what a killed save left there goes, as does every other unfinished one."""
    for stale in folder.parent.glob(".step_*.incomplete"):
        shutil.rmtree(stale)
    folder.mkdir(parents=True)
