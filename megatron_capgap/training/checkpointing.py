"""A run and its checkpoints: going on from the newest one that is whole, and saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_capgap.checkpoint import loader, run_directory
from megatron_capgap.checkpoint.metadata import CheckpointCorrupted
from megatron_capgap.checkpoint.saver import SaveFailed
from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed import collectives
from megatron_capgap.training.run import Run


def resume(run: Run) -> Run:
    """Loads the run's newest checkpoint that is whole, if it has one. Collective.

    Returns:
        The run, knowing what its state stands for.

    Raises:
        UserError: the run has checkpoints, but none that is whole.
    """
    folders, reasons = collectives.run_on_rank0(lambda: run_directory.candidates(run.run_dir))
    damaged: list[Path] = []
    for reason in reasons:
        run.log.warning(reason)
    for folder in folders:
        try:
            found = loader.load_training(folder, run.chunks, run.parallel, run.optimizer)
        except CheckpointCorrupted as error:
            reasons.append(str(error))
            damaged.append(folder)
            run.log.warning(f"{folder.name} is damaged and skipped: {error}")
            continue
        collectives.run_on_rank0(lambda: _make_latest(folder, damaged))  # noqa: B023 (called at once)
        run.log.info(f"resumed from {folder}: step {found.step} of {run.config.train.steps}")
        return replace(run, done=found.step, skipped=found.skipped)
    if refusal := run_directory.no_readable_checkpoint(run.run_dir, reasons):
        raise refusal
    return run


def _make_latest(folder: Path, damaged: list[Path]) -> None:
    run_directory.quarantine(damaged)
    run_directory.set_latest(folder)


def save(run: Run, done: int, skipped: int, *, last: bool) -> bool:
    """Writes a checkpoint of the state after `done` steps. Collective.

    A full disk in the middle of a run is no reason to stop: it says so, and the next save tries again.

    Args:
        run: the run.
        done: its steps.
        skipped: those among them that changed nothing.
        last: there will be no next save.

    Returns:
        Whether it is on disk, or on its way.

    Raises:
        NotSaved: the last one could not be written.
        UserError: another job has taken the run directory over.
    """
    run.watchdog.activity = f"the save after step {done}"
    collectives.run_on_rank0(run.checkpoints.check_ownership)
    # Saving copies the optimizer's state, in the room that the activations leave.
    run.device.release_memory()
    meta = replace(run.checkpoints.metadata(done), skipped=skipped)
    warn_if_save_failed(run, run.checkpoints.saver.wait)  # the one before
    try:
        run.checkpoints.saver.start(meta, run.chunks, run.parallel, run.optimizer)
        if last:
            run.checkpoints.saver.wait()
    except SaveFailed as error:
        if last:
            raise
        _log_save_failed(run, error)
        return False
    return True


def warn_if_save_failed(run: Run, work: Callable[[], None]) -> None:
    """Says what could not be saved; the next save tries again."""
    try:
        work()
    except SaveFailed as error:
        _log_save_failed(run, error)


def _log_save_failed(run: Run, error: SaveFailed) -> None:
    run.log.warning(f"{error}; training goes on, the next save tries again")


@contextmanager
def finish_saving_on_error(run: Run) -> Iterator[None]:
    """What is being written gets done, also where a mistake that all ranks see ends the run."""
    try:
        yield
    except UserError:
        warn_if_save_failed(run, run.checkpoints.saver.wait)
        raise
