"""What lies in a run directory, and what a checkpoint says of itself. No torch: `--check` reads this."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_capgap.checkpoint import checksummed_json, foreign
from megatron_capgap.common.errors import UserError
from megatron_capgap.common.fileio import put_in_place, write_atomically
from megatron_capgap.config.schema import ModelShape, ObjectiveConfig
from megatron_capgap.models import size

FORMAT = 2
METADATA = "capgap.json"
BEST = "best"
CONTENTS = "contents.json"


class CheckpointCorrupted(UserError):
    """A checkpoint is not what was written. The message names the file, what is wrong with it and a way on."""


@dataclass(frozen=True)
class ModelRef:
    """The model that another one was made of."""

    checkpoint: str
    """Its folder."""
    step: int
    """Optimizer steps it had done."""
    tokens: int
    """Tokens it had been trained on."""
    model: ModelShape
    """The model in numbers."""
    parameters: int
    """All its parameters."""
    non_embedding: int
    """Those without embeddings and LM head, less the padding."""
    content: str | None = None
    """Equal for equal files, wherever they lie: a digest of the list of their checksums."""

    @classmethod
    def of(cls, checkpoint: Path, meta: CheckpointMetadata) -> ModelRef:
        """What is remembered of a checkpoint.

        Args:
            checkpoint: its folder.
            meta: what it says of itself.
        """
        listed = checkpoint / CONTENTS
        return cls(
            checkpoint=str(checkpoint),
            step=meta.step,
            tokens=meta.tokens,
            model=meta.model,
            parameters=size.parameters(meta.model),
            non_embedding=meta.kept,
            content=hashlib.sha256(listed.read_bytes()).hexdigest()[:16] if listed.is_file() else None,
        )

    def same(self, other: ModelRef | None) -> bool:
        """Whether both are one model, as far as both know."""
        if other is not None and self.content and other.content:
            return self.content == other.content
        return other is not None and (self.step, self.tokens, self.model) == (other.step, other.tokens, other.model)


@dataclass(frozen=True)
class Provenance:
    """What a run learns from: a start that goes on from one of its checkpoints has the same."""

    data: tuple[str, ...] | None
    """Names and sizes of the datasets, wherever they lie; None where one is not there."""
    weights: tuple[float, ...] | None
    """Their shares; None is in proportion to their tokens."""
    student: ModelRef | None
    """The model it began with; None where that was random."""
    teacher: ModelRef | None
    """Whom it learns from, if from anyone."""
    objective: ObjectiveConfig | None
    """What is minimised, if there is a teacher."""
    packed: bool | None = None
    """Whether conversations share rows, where the data are conversations."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """A checkpoint in words; stands beside the shards as capgap.json."""

    step: int
    """Optimizer steps done."""
    steps: int
    """Steps the run was meant to take."""
    tokens: int
    """Tokens trained on."""
    model: ModelShape
    """The model in numbers."""
    tokenizer: str
    """Where the tokenizer was."""
    tokenizer_fingerprint: str
    """What it was: equal for equal vocabularies."""
    stage: str
    """Which stage wrote this."""
    seed: int
    """Of the run."""
    ranks: tuple[int, int, int, int]
    """(tensor, pipeline, virtual pipeline, data) sizes of the run that wrote it; random states fit these alone."""
    sequence_length: int
    """Tokens in one training sample."""
    device: str = "cpu"
    """Kind of device that wrote it; random states fit this alone."""
    fp8_recipe: str | None = None
    """FP8 recipe of the run that wrote it; delayed scaling keeps its scales in the checkpoint."""
    projections: tuple[str, ...] = ()
    """Matched pairs of layers whose projections are in it, by name, ascending."""
    pruned_from: ModelRef | None = None
    """What the run's first weights were cut out of; stays with the model while it is trained."""
    padding: int = 0
    """Parameters that are zero, for pruning has left layers different numbers of parts; training leaves them zero, and
    this stays with the model."""
    chat_template: str | dict[str, str] | None = None
    """How conversations were written down for it, as a Jinja template or several by name; stays with the model while it
    is trained."""
    expanded_from: ModelRef | None = None
    """The model without the tokens that its vocabulary has taken in; stays with the model while it is trained."""
    skipped: int = 0
    """Bad batches among the steps, which changed no weights."""
    lessons: Provenance | None = None
    """What the run that wrote it learns from; None where nothing was trained."""
    format: int = FORMAT
    """Version of this file."""

    @property
    def kept(self) -> int:
        """Parameters without embeddings and LM head, less the padding."""
        return size.non_embedding_parameters(self.model) - self.padding

    @property
    def holds_scales(self) -> bool:
        """Whether the scales of delayed FP8 scaling are in it."""
        return self.fp8_recipe == "delayed"


def write(meta: CheckpointMetadata, folder: Path) -> None:
    """Writes the manifest into a checkpoint folder, as its last file."""
    checksummed_json.write(folder / METADATA, asdict(meta))


def read(folder: Path) -> CheckpointMetadata:
    """Reads a checkpoint's manifest.

    Raises:
        Damaged: it is not there, or not as it was written.
        UserError: another version of this project wrote it.
    """
    path = folder / METADATA
    try:
        content = checksummed_json.read(path)
    except FileNotFoundError:
        raise CheckpointCorrupted(
            f"{folder}: no {METADATA}, so it is no finished checkpoint; name a run directory or RUN/checkpoints/step_N"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointCorrupted(f"{path}: cannot be read ({error}); use another checkpoint") from None
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise UserError(f"{path}: format {found!r}, this version reads format {FORMAT}; use the version that wrote it")
    try:
        # As JSON, where pydantic's strict mode takes lists for tuples.
        return TypeAdapter(CheckpointMetadata).validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointCorrupted(
            f"{path}: {key}: {first['msg']}; the file is damaged, use another checkpoint"
        ) from None


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


def newest_readable(run_dir: Path) -> CheckpointMetadata | None:
    """What the run would go on from, as far as the words of its checkpoints tell; None where it is new.

    Raises:
        UserError: none of its checkpoints can be read, or another version wrote the newest one.
    """
    folders, reasons = candidates(run_dir)
    for folder in folders:
        try:
            return read(folder)
        except CheckpointCorrupted as error:
            reasons.append(str(error))
    if error := no_readable_checkpoint(run_dir, reasons):
        raise error
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
    if (path / METADATA).is_file():
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
