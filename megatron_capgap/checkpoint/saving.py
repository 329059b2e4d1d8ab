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

from megatron_capgap.checkpoint import manifest as manifests
from megatron_capgap.checkpoint import shards, store
from megatron_capgap.checkpoint.manifest import Manifest
from megatron_capgap.config.errors import UserError
from megatron_capgap.runtime.launch import on_first_rank
from megatron_capgap.runtime.layout import Grid

State = Callable[[], ShardedStateDict]
"""Describes what is written; collective."""


class NotSaved(UserError):
    """A checkpoint could not be written; older ones and `latest` are as they were."""


class Saver:
    """Writes the checkpoints of one run. Collective.

    Beside the training means: `begin` copies this rank's part into host memory, and a thread gathers the optimizer's
    state and writes. All that the ranks exchange meanwhile goes over process groups that training does not use, so that
    it cannot be mistaken for theirs.

    Args:
        run_dir: the run's directory.
        keep: number of newest checkpoints that stay on disk.
        beside: whether training goes on while a checkpoint is written.
        timeout_seconds: how long a rank that writes may wait for the others.
    """

    def __init__(self, run_dir: Path, keep: int, *, beside: bool, timeout_seconds: int) -> None:
        self._run_dir, self._keep = run_dir, keep
        timeout = timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if beside else None
        self._beside = beside
        self._begun: Future[None] | None = None

    def begin(
        self, manifest: Manifest, chunks: Sequence[torch.nn.Module], grid: Grid, optimization: store.Optimization
    ) -> None:
        """Writes one checkpoint, or begins to. Collective; nothing begun before may be under way.

        When it is on disk it is the run's latest; if that fails, all older ones stay as they were.

        Args:
            manifest: what the checkpoint says of itself.
            chunks: this rank's model chunks.
            grid: their layout.
            optimization: optimizer and schedule.

        Raises:
            NotSaved: a file could not be written; on every rank alike.
        """
        assert self._begun is None, "one checkpoint at a time"
        staged = self._run_dir / "checkpoints" / f".step_{manifest.step}.incomplete"
        try:
            on_first_rank(lambda: _fresh_folder(staged))
        except UserError as error:
            raise _not_saved(manifest, staged, error) from error
        state = store.training_state(chunks, grid, optimization, copied=self._beside)
        if not self._beside:
            self._write(manifest, staged, state)
            return
        self._begun = Future()
        # A daemon, for a process that must go at once does not wait for a rank that is lost.
        Thread(target=self._write_beside, args=(self._begun, manifest, staged, state), daemon=True).start()

    def end(self) -> None:
        """Waits until what was begun is on disk.

        Raises:
            NotSaved: it could not be written; on every rank alike.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def look(self) -> None:
        """As `end` where nothing is left to wait for; else nothing. The ranks see it at different steps."""
        if self._begun is not None and self._begun.done():
            self.end()

    def _write_beside(self, begun: Future[None], manifest: Manifest, staged: Path, state: State) -> None:
        try:
            self._write(manifest, staged, state)
        except BaseException as error:  # for the thread that trains, whatever it is
            begun.set_exception(error)
        else:
            begun.set_result(None)

    def _write(self, manifest: Manifest, staged: Path, state: State) -> None:
        def finish() -> None:
            manifests.write(manifest, staged)
            manifests.publish(staged, self._run_dir, manifest.step, self._keep)

        try:
            shards.write(staged, shards.part_of(state(), self._group), self._group)
            on_first_rank(finish, self._group)
        except UserError as error:
            raise _not_saved(manifest, staged, error) from error


def _not_saved(manifest: Manifest, staged: Path, error: UserError) -> NotSaved:
    if dist.get_rank() == 0:
        shutil.rmtree(staged, ignore_errors=True)  # its space is what the next save may need
    return NotSaved(f"step {manifest.step} was not saved: {error}; older checkpoints are as they were")


def _fresh_folder(folder: Path) -> None:
    """An empty folder to write into; what a killed save left there goes, as does every other unfinished one."""
    for stale in folder.parent.glob(".step_*.incomplete"):
        shutil.rmtree(stale)
    folder.mkdir(parents=True)
