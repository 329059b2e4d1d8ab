"""Run directories: checkpoints, the pointers `latest` and `best`, publishing. Does not import torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_capgap.checkpoint import foreign, metadata
from megatron_capgap.checkpoint.metadata import CheckpointCorrupted
from megatron_capgap.common.errors import UserError
from megatron_capgap.common.fileio import put_in_place, write_atomically

BEST = "best"


def begin_training_run(run_dir: Path) -> None:
    """Creates the checkpoints folder, which marks a training run before its first checkpoint."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)


def is_training_run(run_dir: Path) -> bool:
    """Whether a training run was started in this directory."""
    return (run_dir / "checkpoints").is_dir()


def steps_in(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in a run directory, ascending; only complete checkpoints are named step_N."""
    names = [folder.name.removeprefix("step_") for folder in (run_dir / "checkpoints").glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def latest(run_dir: Path) -> Path | None:
    """The checkpoint that `latest` names, or None if the run has none yet.

    Raises:
        CheckpointCorrupted: `latest` names no checkpoint of the run, or is missing although there are checkpoints.
    """
    return _read_pointer(run_dir, "latest", needed=True)


def best(run_dir: Path) -> Path | None:
    """The checkpoint that `best` names, of the lowest held-out loss; None if the run does not track it.

    Raises:
        CheckpointCorrupted: `best` names no checkpoint of the run.
    """
    return _read_pointer(run_dir, BEST, needed=False)


def _read_pointer(run_dir: Path, pointer_name: str, *, needed: bool) -> Path | None:
    pointer, steps = run_dir / pointer_name, steps_in(run_dir)
    there = ", ".join(f"step_{step}" for step in steps) or "none"
    try:
        name = pointer.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if not steps or not needed:
            return None
        raise CheckpointCorrupted(
            f"{pointer}: is missing, although there are checkpoints ({there}); write the name of one of them into it"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointCorrupted(f"{pointer}: cannot be read ({error}); write one of these into it: {there}") from None
    if name not in [f"step_{step}\n" for step in steps]:
        raise CheckpointCorrupted(
            f"{pointer}: names {name.strip()!r}, which is not a complete checkpoint (existing: {there}); "
            "write one of these and a newline into it"
        )
    return run_dir / "checkpoints" / name.strip()


def candidates(run_dir: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints that a run may resume from, in order of preference, and warnings about `latest`.

    The first is the one that `latest` names, followed by older ones; all of them if `latest` is damaged.
    """
    steps, lines = steps_in(run_dir), []
    try:
        named = latest(run_dir)
        newest = -1 if named is None else int(named.name.removeprefix("step_"))
        if newer := [f"step_{step}" for step in steps if step > newest]:
            lines = [
                f"{run_dir}/latest: names step_{newest} although {', '.join(newer)} exists; resuming from step_{newest}"
            ]
            steps = [step for step in steps if step <= newest]
    except CheckpointCorrupted as error:
        lines = [str(error)]
    return [run_dir / "checkpoints" / f"step_{step}" for step in reversed(steps)], lines


def no_readable_checkpoint(run_dir: Path, reasons: list[str]) -> UserError | None:
    """The error if a run has checkpoints, or a `latest`, but none that it can resume from; None for a new run."""
    if not reasons:
        return None
    return UserError(
        f"{run_dir}: no checkpoint of this run is intact, {len(reasons)} found damaged, first {reasons[0]}; restore "
        "one, or start a new run in another run_dir"
    )


def newest_readable(run_dir: Path) -> metadata.CheckpointMetadata | None:
    """Metadata of the newest checkpoint whose metadata can be read; None for a new run.

    Raises:
        UserError: no metadata can be read, or another version wrote the newest checkpoint.
    """
    folders, reasons = candidates(run_dir)
    for folder in folders:
        try:
            return metadata.read(folder)
        except CheckpointCorrupted as error:
            reasons.append(str(error))
    if refusal := no_readable_checkpoint(run_dir, reasons):
        raise refusal
    return None


def quarantine(damaged: list[Path]) -> None:
    """Renames damaged checkpoints to `step_N.damaged`: they are ignored and kept for inspection."""
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def set_latest(folder: Path) -> None:
    """Points `latest` at a checkpoint."""
    write_atomically(folder.parents[1] / "latest", folder.name + "\n")


def set_best(run_dir: Path, step: int | None) -> None:
    """Points `best` at a checkpoint, if it exists; None removes `best`."""
    if step in steps_in(run_dir):
        write_atomically(run_dir / BEST, f"step_{step}\n")
    elif step is None:
        (run_dir / BEST).unlink(missing_ok=True)


def locate(checkpoint: str) -> Path:
    """Resolves a checkpoint path of a configuration: RUN/checkpoints/step_N, or a run directory, for which it is the
    best step if the run has early stopping, else the latest.

    Raises:
        UserError: there is no complete checkpoint of this project.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{checkpoint}: no such checkpoint; name a run directory or RUN/checkpoints/step_N")
    if (path / metadata.CAPGAP_METADATA_FILE).is_file():
        return path
    named = best(path) or latest(path)
    if named is None:
        foreign.refuse(path)
        raise UserError(
            f"{checkpoint}: has no complete checkpoint; name a run directory that has one, or RUN/checkpoints/step_N"
        )
    return named


def publish(staged: Path, run_dir: Path, step: int, keep: int) -> Path:
    """Renames a completely written checkpoint to its final name, points `latest` at it, and deletes the oldest ones.

    Each rename is atomic; if the process dies between two of them, `latest` points at an older, complete checkpoint.

    Args:
        staged: the folder it was written to, on the same file system.
        run_dir: its run directory.
        step: its step.
        keep: number of newest checkpoints to keep, besides the best one.
    """
    final = run_dir / "checkpoints" / f"step_{step}"
    put_in_place(staged, final)
    set_latest(final)
    # Later steps exist if the run was resumed from an older checkpoint; they are ignored.
    named = run_dir / BEST
    kept = named.read_text(errors="replace").strip() if named.is_file() else None
    for old in [done for done in steps_in(run_dir) if done <= step][:-keep]:
        if kept != f"step_{old}":
            shutil.rmtree(run_dir / "checkpoints" / f"step_{old}", ignore_errors=True)
    return final
