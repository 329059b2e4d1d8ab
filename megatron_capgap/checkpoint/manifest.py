"""What lies in a run directory, and what a checkpoint says of itself. No torch: `--check` reads this."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_capgap.config.errors import UserError
from megatron_capgap.config.files import put_in_place, write_atomically
from megatron_capgap.config.schema import ModelShape

FORMAT = 1
MANIFEST = "capgap.json"


@dataclass(frozen=True)
class Origin:
    """The model that a pruned one was cut out of."""

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
    """Those without embeddings and LM head."""


@dataclass(frozen=True)
class Manifest:
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
    pruned_from: Origin | None = None
    """What the run's first weights were cut out of; stays with the model while it is trained."""
    format: int = FORMAT
    """Version of this file."""

    @property
    def holds_scales(self) -> bool:
        """Whether the scales of delayed FP8 scaling are in it."""
        return self.fp8_recipe == "delayed"


def write(manifest: Manifest, folder: Path) -> None:
    """Writes the manifest into a checkpoint folder."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")


def read(folder: Path) -> Manifest:
    """Reads a checkpoint's manifest.

    Raises:
        UserError: there is none, it is damaged, or a newer version of this project wrote it.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no {MANIFEST}, so it is no finished checkpoint; name a run directory or RUN/checkpoints/step_N"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise UserError(f"{path}: format {found!r}, this version reads format {FORMAT}; use the version that wrote it")
    try:
        return TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}; the file is damaged, use another checkpoint") from None


def begin_training_run(run_dir: Path) -> None:
    """Makes the folder that tells a training run from an evaluation, before there is a checkpoint in it."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)


def is_training_run(run_dir: Path) -> bool:
    """Whether a training run has begun in this directory."""
    return (run_dir / "checkpoints").is_dir()


def steps_in(run_dir: Path) -> list[int]:
    """Steps of the finished checkpoints in a run directory, ascending."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdigit() and (folder / MANIFEST).is_file():
            found.append(int(number))
    return sorted(found)


def latest(run_dir: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where the run has none yet.

    Raises:
        UserError: `latest` names a checkpoint that is not there.
    """
    pointer = run_dir / "latest"
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    folder = run_dir / "checkpoints" / name
    if not name.startswith("step_") or not (folder / MANIFEST).is_file():
        there = ", ".join(f"step_{step}" for step in steps_in(run_dir)) or "none"
        raise UserError(
            f"{pointer}: names {name!r}, which is no finished checkpoint (there: {there}); write one of those into it"
        )
    return folder


def locate(checkpoint: str) -> Path:
    """A checkpoint from what a configuration names: a run directory (its latest step) or RUN/checkpoints/step_N.

    Raises:
        UserError: nothing there is a finished checkpoint.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{checkpoint}: no such checkpoint; name a run directory or RUN/checkpoints/step_N")
    if (path / MANIFEST).is_file():
        return path
    newest = latest(path)
    if newest is None:
        raise UserError(
            f"{checkpoint}: holds no finished checkpoint; name a run directory that has one, or RUN/checkpoints/step_N"
        )
    return newest


def publish(staged: Path, run_dir: Path, step: int, keep: int) -> Path:
    """Gives a completely written checkpoint its name, then points `latest` at it, then drops the oldest ones.

    Every move is one atomic rename; whoever dies between two of them leaves an older, whole checkpoint behind `latest`.

    Args:
        staged: the folder it was written to, on the same file system.
        run_dir: where it belongs.
        step: its step.
        keep: number of newest checkpoints that stay.
    """
    final = run_dir / "checkpoints" / f"step_{step}"
    put_in_place(staged, final)
    write_atomically(run_dir / "latest", final.name + "\n")
    # Later steps than this one are there when the run went on from an older checkpoint; they do not count.
    for old in [done for done in steps_in(run_dir) if done <= step][:-keep]:
        shutil.rmtree(run_dir / "checkpoints" / f"step_{old}", ignore_errors=True)
    return final
