"""Checkpoint metadata: CHECKPOINT/capgap.json. Does not import torch, so that `--check` can read it."""

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
CAPGAP_METADATA_FILE = "capgap.json"
CONTENTS = "contents.json"
_KEYS_ON_DISK = {"parallel_sizes": "ranks", "provenance": "lessons"}
"""Fields of `CheckpointMetadata` whose key in the file differs."""
_FIELDS_BY_KEY = {key: field for field, key in _KEYS_ON_DISK.items()}


class CheckpointCorrupted(UserError):
    """A checkpoint differs from what was written. The message names the file, the error and the fix."""


@dataclass(frozen=True)
class ModelRef:
    """Reference to a model that another one is derived from."""

    checkpoint: str
    """Checkpoint folder."""
    step: int
    """Its number of optimizer steps."""
    tokens: int
    """Its number of training tokens."""
    model: ModelShape
    """Its shape."""
    parameters: int
    """Its total number of parameters."""
    non_embedding: int
    """Its parameters without embeddings, LM head and padding."""
    content: str | None = None
    """Digest of the checkpoint's list of checksums: equal for equal files, independent of their path."""

    @classmethod
    def of(cls, checkpoint: Path, meta: CheckpointMetadata) -> ModelRef:
        """Reference to a checkpoint.

        Args:
            checkpoint: its folder.
            meta: its metadata.
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
        """Whether both are the same model, by the fields that both have."""
        if other is not None and self.content and other.content:
            return self.content == other.content
        return other is not None and (self.step, self.tokens, self.model) == (other.step, other.tokens, other.model)


@dataclass(frozen=True)
class Provenance:
    """What a run trains on and from; a resumed run must have the same."""

    data: tuple[str, ...] | None
    """Names and sizes of the datasets, independent of their path; None if one is missing."""
    weights: tuple[float, ...] | None
    """Weights of the datasets; None means in proportion to their tokens."""
    student: ModelRef | None
    """Model of the initial weights; None for random initialisation."""
    teacher: ModelRef | None
    """The teacher, if any."""
    objective: ObjectiveConfig | None
    """The objective, if there is a teacher."""
    packed: bool | None = None
    """Whether conversations are packed into rows; None for other data."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """Metadata of a checkpoint, stored as capgap.json."""

    step: int
    """Optimizer steps done."""
    steps: int
    """Planned steps of the run."""
    tokens: int
    """Tokens trained on."""
    model: ModelShape
    """Shape of the model."""
    tokenizer: str
    """Path of the tokenizer."""
    tokenizer_fingerprint: str
    """Hash of its vocabulary."""
    stage: str
    """Stage that wrote the checkpoint."""
    seed: int
    """Seed of the run."""
    parallel_sizes: tuple[int, int, int, int]
    """(tensor, pipeline, virtual pipeline, data) sizes of the run that wrote it; random states fit only these."""
    sequence_length: int
    """Tokens in one training sample."""
    device: str = "cpu"
    """Device type of the run that wrote it; random states fit only this type."""
    fp8_recipe: str | None = None
    """FP8 recipe of the run that wrote it; with delayed scaling the checkpoint includes the scales."""
    projections: tuple[str, ...] = ()
    """Names of the matched layer pairs whose projections are in the checkpoint, ascending."""
    pruned_from: ModelRef | None = None
    """The model that this one was pruned from; kept through later training."""
    padding: int = 0
    """Number of zero parameters that pad layers pruned to different sizes; they stay zero in training, and the number
    is kept."""
    chat_template: str | dict[str, str] | None = None
    """Chat template of its training data, as Jinja or several by name; kept through later training."""
    expanded_from: ModelRef | None = None
    """The model before its vocabulary was expanded; kept through later training."""
    skipped: int = 0
    """Steps with a bad batch, which did not change the weights."""
    provenance: Provenance | None = None
    """Provenance of the run that wrote it; None if nothing was trained."""
    format: int = FORMAT
    """Version of this file."""

    @property
    def kept(self) -> int:
        """Parameters without embeddings, LM head and padding."""
        return size.non_embedding_parameters(self.model) - self.padding

    @property
    def holds_scales(self) -> bool:
        """Whether the checkpoint includes the scales of delayed FP8 scaling."""
        return self.fp8_recipe == "delayed"


def write(meta: CheckpointMetadata, folder: Path) -> None:
    """Writes the metadata into a checkpoint folder, as its last file."""
    content = {_KEYS_ON_DISK.get(name, name): value for name, value in asdict(meta).items()}
    checksummed_json.write(folder / CAPGAP_METADATA_FILE, content)


def read(folder: Path) -> CheckpointMetadata:
    """Reads the metadata of a checkpoint.

    Raises:
        CheckpointCorrupted: it is missing, or differs from what was written.
        UserError: another version of this project wrote it.
    """
    path = folder / CAPGAP_METADATA_FILE
    try:
        content = checksummed_json.read(path)
    except FileNotFoundError:
        raise CheckpointCorrupted(
            f"{folder}: no {CAPGAP_METADATA_FILE}, so it is not a checkpoint; "
            "name a run directory or RUN/checkpoints/step_N"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointCorrupted(f"{path}: cannot be read ({error}); use another checkpoint") from None
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise UserError(f"{path}: format {found!r}, this version reads format {FORMAT}; use the version that wrote it")
    try:
        # Validate as JSON, where pydantic's strict mode accepts lists for tuples.
        fields = {_FIELDS_BY_KEY.get(key, key): value for key, value in content.items()}
        return TypeAdapter(CheckpointMetadata).validate_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(_KEYS_ON_DISK.get(str(part), str(part)) for part in first["loc"])
        raise CheckpointCorrupted(
            f"{path}: {key}: {first['msg']}; the file is damaged, use another checkpoint"
        ) from None
