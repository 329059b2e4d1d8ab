"""A run directory: its checkpoints, the pointers `latest` and `best`, and how a checkpoint is published. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_capgap.checkpoint import foreign, metadata
from megatron_capgap.checkpoint.metadata import CheckpointCorrupted
from megatron_capgap.common.errors import UserError
from megatron_capgap.common.fileio import put_in_place, write_atomically

BEST = "best"


def begin_training_run(run_dir: Path) -> None:
    """Makes the folder that tells a training run from an evaluation, before there is a checkpoint in it."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)


def is_training_run(run_dir: Path) -> bool:
    """Whether a training run has begun in this directory."""
    return (run_dir / "checkpoints").is_dir()


def steps_in(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in a run directory, ascending; a folder has that name only when it was finished once."""
    names = [folder.name.removeprefix("step_") for folder in (run_dir / "checkpoints").glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def latest(run_dir: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where the run has none yet.

    Raises:
        Damaged: `latest` names no checkpoint of the run, or is not there although checkpoints are.
    """
    return _read_pointer(run_dir, "latest", needed=True)


def best(run_dir: Path) -> Path | None:
    """The checkpoint that `best` names: of the lowest held-out loss; None where the run does not look for it.

    Raises:
        Damaged: `best` names no checkpoint of the run.
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
            f"{pointer}: is not there, checkpoints are ({there}); write the name of one of them into it"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointCorrupted(f"{pointer}: cannot be read ({error}); write one of those into it: {there}") from None
    if name not in [f"step_{step}\n" for step in steps]:
        raise CheckpointCorrupted(
            f"{pointer}: names {name.strip()!r}, which is no finished checkpoint (there: {there}); "
            "write one of those and a newline into it"
        )
    return run_dir / "checkpoints" / name.strip()


def candidates(run_dir: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints that a run may go on from, the first one first, and what is to be said about `latest`.

    The first is what `latest` names, then older ones; all of them where `latest` is damaged.
    """
    steps, said = steps_in(run_dir), []
    try:
        named = latest(run_dir)
        newest = -1 if named is None else int(named.name.removeprefix("step_"))
        if newer := [f"step_{step}" for step in steps if step > newest]:
            said = [
                f"{run_dir}/latest: names step_{newest} although {', '.join(newer)} is there too; going on from "
                f"step_{newest}"
            ]
            steps = [step for step in steps if step <= newest]
    except CheckpointCorrupted as error:
        said = [str(error)]
    return [run_dir / "checkpoints" / f"step_{step}" for step in reversed(steps)], said


def no_readable_checkpoint(run_dir: Path, reasons: list[str]) -> UserError | None:
    """The error of a run that has checkpoints, or a `latest`, but none to go on from; None where it is a new one."""
    if not reasons:
        return None
    return UserError(
        f"{run_dir}: no checkpoint of this run is whole, {len(reasons)} found damaged, first {reasons[0]}; bring one "
        "back, or start anew in another run_dir"
    )


def newest_readable(run_dir: Path) -> metadata.CheckpointMetadata | None:
    """What the run would go on from, as far as the words of its checkpoints tell; None where it is new.

    Raises:
        UserError: none of its checkpoints can be read, or another version wrote the newest one.
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
    """Renames checkpoints that were found damaged to `step_N.damaged`: they count no more and can be looked at."""
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def set_latest(folder: Path) -> None:
    """Makes a checkpoint the one that `latest` names."""
    write_atomically(folder.parents[1] / "latest", folder.name + "\n")


def set_best(run_dir: Path, step: int | None) -> None:
    """Makes a checkpoint the one that `best` names, as far as it is there; None takes `best` away."""
    if step in steps_in(run_dir):
        write_atomically(run_dir / BEST, f"step_{step}\n")
    elif step is None:
        (run_dir / BEST).unlink(missing_ok=True)


def locate(checkpoint: str) -> Path:
    """A checkpoint from what a configuration names: RUN/checkpoints/step_N, or a run directory: its best step where it
    was stopped early or could have been, else its latest.

    Raises:
        UserError: nothing there is a finished checkpoint of this project.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{checkpoint}: no such checkpoint; name a run directory or RUN/checkpoints/step_N")
    if (path / metadata.METADATA).is_file():
        return path
    named = best(path) or latest(path)
    if named is None:
        foreign.refuse(path)
        raise UserError(
            f"{checkpoint}: holds no finished checkpoint; name a run directory that has one, or RUN/checkpoints/step_N"
        )
    return named


def publish(staged: Path, run_dir: Path, step: int, keep: int) -> Path:
    """Gives a completely written checkpoint its name, then points `latest` at it, then drops the oldest ones.

    Every move is one atomic rename; whoever dies between two of them leaves an older, whole checkpoint behind `latest`.

    Args:
        staged: the folder it was written to, on the same file system.
        run_dir: where it belongs.
        step: its step.
        keep: number of newest checkpoints that stay, beside the best one.
    """
    final = run_dir / "checkpoints" / f"step_{step}"
    put_in_place(staged, final)
    set_latest(final)
    # Later steps than this one are there when the run went on from an older checkpoint; they do not count.
    named = run_dir / BEST
    kept = named.read_text(errors="replace").strip() if named.is_file() else None
    for old in [done for done in steps_in(run_dir) if done <= step][:-keep]:
        if kept != f"step_{old}":
            shutil.rmtree(run_dir / "checkpoints" / f"step_{old}", ignore_errors=True)
    return final
