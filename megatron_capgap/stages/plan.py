"""Plan of a run: a validated configuration with its models, tokenizer and provenance; frozen, one class per kind of
stage. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_capgap.checkpoint.metadata import CheckpointMetadata, Provenance
from megatron_capgap.config import derived
from megatron_capgap.config.finetune import FinetuneConfig
from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.config.prune import PruneConfig
from megatron_capgap.config.schema import Config, ModelShape, TeacherConfig
from megatron_capgap.data.chat_template import Template
from megatron_capgap.data.tokenizer import Tokenizer
from megatron_capgap.pruning.student_shape import Budget, StudentTarget


@dataclass(frozen=True)
class CheckpointSource:
    """Checkpoint that a model's weights are read from."""

    folder: Path
    meta: CheckpointMetadata


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What `--check` needs of a run: models, ranks and batch. Numbers may stand in for checkpoints."""

    loaded: LoadedConfig
    stage: str
    world: int
    """Number of ranks, including those of a disjoint teacher."""
    student: ModelShape
    student_source: CheckpointSource | None
    resume_metadata: CheckpointMetadata | None = None
    """Metadata of the newest checkpoint in run_dir; None for a new run. Its files are not verified yet."""
    teacher: ModelShape | None = None
    teacher_source: CheckpointSource | None = None
    budget: Budget | None = None
    """Total sizes to keep over all layers, if prune may keep different sizes per layer; `student` is then the smallest
    possible shape."""

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.loaded.config

    @property
    def student_non_embedding_params(self) -> int:
        """Non-embedding parameters of the student, without the zero padding of per-layer pruning."""
        return self.student_source.meta.kept if self.student_source else StudentTarget(self.student, self.budget).kept

    @property
    def teacher_non_embedding_params(self) -> int:
        """Non-embedding parameters of the teacher, without zero padding. Requires a teacher."""
        assert self.teacher is not None
        return self.teacher_source.meta.kept if self.teacher_source else StudentTarget(self.teacher).kept

    @property
    def finetune(self) -> FinetuneConfig:
        """The section finetune, or its defaults."""
        return self.config.finetune or FinetuneConfig()

    @property
    def input_files(self) -> dict[str, tuple[str, ...]]:
        """Datasets or conversation files that the stage opens, by key."""
        return files_read(self.config, self.stage)

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        return derived.global_batch(self.config, self.config.student.layout, self.student_world)

    @property
    def student_world(self) -> int:
        """Number of the student's ranks."""
        return derived.student_world(self.config, self.world)


@dataclass(frozen=True, kw_only=True)
class RunPlan(Outline):
    """Plan of adapt, evaluate, and finetune without a teacher."""

    provenance: Provenance | None
    """Data, models and objective, if the stage trains."""
    tokenizer: Tokenizer
    template: Template | None
    """Chat template, if the data are conversations."""

    @property
    def warnings(self) -> list[str]:
        """Warnings about the tokenizer."""
        found, path = list(self.tokenizer.remarks), self.config.data.tokenizer
        for key, source in (("student.checkpoint", self.student_source), ("teacher.checkpoint", self.teacher_source)):
            theirs = source and self.tokenizer.special_ids_of(source.meta.tokenizer_fingerprint)
            if theirs and theirs != (self.tokenizer.bos, self.tokenizer.eos):
                found.append(
                    f"{key}: its tokenizer had bos {theirs[0]} and eos {theirs[1]}, data.tokenizer {path} has bos "
                    f"{self.tokenizer.bos} and eos {self.tokenizer.eos}; their pieces are the same"
                )
        if self.tokenizer.vocab_size > self.student.vocab:
            pieces = self.tokenizer.pieces()[self.student.vocab :]
            shown = ", ".join(repr(piece) for piece in pieces[:5]) + (", ..." if len(pieces) > 5 else "")
            found.append(
                f"data.tokenizer: {len(pieces)} of the tokens of {path} have no row in the model's vocab of "
                f"{self.student.vocab} ({shown}); data that hold one are refused"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class DistillationPlan(RunPlan):
    """Plan of distill, and of finetune with a teacher."""

    teacher: ModelShape = field()
    teacher_source: CheckpointSource = field()

    @property
    def teacher_config(self) -> TeacherConfig:
        """The section `teacher`."""
        assert self.config.teacher is not None, "guaranteed by config.loader"
        return self.config.teacher


@dataclass(frozen=True, kw_only=True)
class PruningPlan(RunPlan):
    """Plan of prune: the student's shape and the teacher."""

    teacher: ModelShape = field()
    teacher_source: CheckpointSource = field()

    @property
    def prune_config(self) -> PruneConfig:
        """The section `prune`."""
        assert self.config.prune is not None, "guaranteed by config.loader"
        return self.config.prune


def reads_conversations(config: Config, stage: str) -> bool:
    """Whether the data are conversations."""
    return stage == "finetune" or config.finetune is not None


def files_read(config: Config, stage: str) -> dict[str, tuple[str, ...]]:
    """Datasets or conversation files that a stage opens, by key."""
    unread = stage == "evaluate" and reads_conversations(config, stage)
    return {"data.train": () if unread else config.data.train, "data.valid": config.data.valid}
