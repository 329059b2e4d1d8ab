"""What a checkpoint says of itself: CHECKPOINT/capgap.json. No torch: `--check` reads this."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_capgap.checkpoint import checksummed_json
from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import ModelShape, ObjectiveConfig
from megatron_capgap.models import size

FORMAT = 2
METADATA = "capgap.json"
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
