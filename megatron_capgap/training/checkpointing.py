"""Resumes a run from its newest intact checkpoint, and saves its checkpoints."""

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
from megatron_capgap.training import param_sync
from megatron_capgap.training.run import TrainingRun


def resume(run: TrainingRun) -> TrainingRun:
    """Loads the run's newest intact checkpoint, if there is one. Collective.

    Returns:
        The run, with the step counts of the loaded state.

    Raises:
        UserError: the run has checkpoints, but none is intact.
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
        return replace(run, steps_done=found.step, steps_skipped=found.skipped)
    if refusal := run_directory.no_readable_checkpoint(run.run_dir, reasons):
        raise refusal
    return run


def _make_latest(folder: Path, damaged: list[Path]) -> None:
    run_directory.quarantine(damaged)
    run_directory.set_latest(folder)


def save(run: TrainingRun, done: int, skipped: int, *, last: bool) -> bool:
    """Writes a checkpoint of the state after `done` steps. Collective.

    A failed save, e.g. on a full disk, does not stop the run: a warning is logged, and the next save retries.

    Args:
        run: the run.
        done: steps done.
        skipped: bad batches among them, which changed nothing.
        last: whether this is the final save of the process.

    Returns:
        Whether the checkpoint is on disk, or being written.

    Raises:
        SaveFailed: the last checkpoint could not be written.
        UserError: another job has taken over the run directory.
    """
    run.watchdog.activity = f"the save after step {done}"
    with run.device.span("save"):
        return _save(run, done, skipped, last=last)


def _save(run: TrainingRun, done: int, skipped: int, *, last: bool) -> bool:
    collectives.run_on_rank0(run.checkpoints.check_ownership)
    param_sync.gather_all(run.chunks)
    # A save copies the optimizer's state, into the memory that activations used.
    run.device.release_memory()
    meta = replace(run.checkpoints.metadata(done), skipped=skipped)
    warn_if_save_failed(run, run.checkpoints.saver.wait)  # the previous save
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


def warn_if_save_failed(run: TrainingRun, work: Callable[[], None]) -> None:
    """Runs `work`; a failed save is logged as a warning, and the next save retries."""
    try:
        work()
    except SaveFailed as error:
        _log_save_failed(run, error)


def _log_save_failed(run: TrainingRun, error: SaveFailed) -> None:
    run.log.warning(f"{error}; training continues, the next save tries again")


@contextmanager
def finish_saving_on_error(run: TrainingRun) -> Iterator[None]:
    """Completes a save that is under way, also if an error that all ranks raise ends the run."""
    try:
        yield
    except UserError:
        warn_if_save_failed(run, run.checkpoints.saver.wait)
        raise
