"""What a configuration means: model shapes found, everything checked. No torch, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_capgap.checkpoint import manifest as manifests
from megatron_capgap.checkpoint.manifest import Lessons, Manifest, Origin
from megatron_capgap.config import checks, derive
from megatron_capgap.config.errors import ConfigError, UserError
from megatron_capgap.config.finetune import Finetune
from megatron_capgap.config.load import Loaded
from megatron_capgap.config.schema import Config, ModelShape
from megatron_capgap.data import indexed
from megatron_capgap.data.chat import Template, open_template
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from megatron_capgap.data.turns import conversations_file
from megatron_capgap.pruning.target import Budget, Target, target
from megatron_capgap.stages.begun import begun

Found = TypeVar("Found")


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Resolved:
    """A checked configuration with its models and batch in numbers."""

    loaded: Loaded
    stage: str
    world: int
    """All ranks, the teacher's own included."""
    student: ModelShape
    teacher: ModelShape | None
    student_source: Source | None
    teacher_source: Source | None
    lessons: Lessons | None
    """What is learned from, where something is trained."""
    resumed: Manifest | None
    """The newest checkpoint in run_dir, if this run has begun before; its files are not checked yet."""
    tokenizer: Tokenizer
    template: Template | None
    """How conversations are written down, where the data are conversations."""
    budget: Budget | None = None
    """What layers keep together where prune may leave each a number of its own; `student` is then the least shape."""

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.loaded.config

    @property
    def remarks(self) -> list[str]:
        """What the reader must know of the tokenizer."""
        found, path = list(self.tokenizer.remarks), self.config.data.tokenizer
        for key, source in (("student.checkpoint", self.student_source), ("teacher.checkpoint", self.teacher_source)):
            theirs = source and self.tokenizer.special_ids_of(source.manifest.tokenizer_fingerprint)
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

    @property
    def student_kept(self) -> int:
        """The student's parameters without embeddings, less those of layers that store more parts than they keep."""
        return self.student_source.manifest.kept if self.student_source else Target(self.student, self.budget).kept

    @property
    def finetune(self) -> Finetune:
        """How conversations are read and learned."""
        return self.config.finetune or Finetune()

    @property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """The datasets or files of conversations that are opened, by key."""
        return _reads(self.config, self.stage)

    @property
    def global_batch(self) -> int:
        """Sequences in one step over all ranks."""
        return derive.global_batch(self.config, self.config.student.layout, self.student_world)

    @property
    def student_world(self) -> int:
        """Ranks that the student is cut over."""
        return derive.student_world(self.config, self.world)


def resolve(loaded: Loaded, stage: str, world: int, capability: tuple[int, int] | None = None) -> Resolved:
    """Finds the models and checks everything that can be checked without reading data.

    Raises:
        UserError: with every problem that was found.
    """
    config, problems = loaded.config, list[str]()

    def attempt(work: Callable[[], Found]) -> Found | None:
        try:
            return work()
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    student_source = attempt(lambda: _source(loaded, "student.checkpoint", config.student.checkpoint))
    teacher_source = attempt(
        lambda: _source(loaded, "teacher.checkpoint", config.teacher.checkpoint if config.teacher else None)
    )
    found_models = not problems
    tokenizer = attempt(lambda: _tokenizer(loaded))
    template = attempt(lambda: _template(loaded, stage, tokenizer)) if tokenizer else None
    teacher = teacher_source.manifest.model if teacher_source else None
    wanted = attempt(lambda: _wanted(loaded, stage, student_source, teacher)) if found_models else None
    if wanted:
        attempt(lambda: checks.check(loaded, stage, world, wanted.shape, teacher, capability))
    if wanted and tokenizer:
        problems += _vocabulary_problems(loaded, wanted.shape, student_source, tokenizer)
        problems += _fingerprint_problems(loaded, "student.checkpoint", student_source, tokenizer)
        problems += _fingerprint_problems(loaded, "teacher.checkpoint", teacher_source, tokenizer)
        problems += _length_problems(loaded, teacher_source)
    if problems:  # what the first rank alone would find later
        raise ConfigError([*problems, *missing_data(loaded, stage)])
    assert wanted and tokenizer
    lessons = _lessons(config, stage, student_source, teacher_source)
    resumed = begun(loaded, stage, world, wanted, teacher, tokenizer, template, lessons)
    found = (student_source, teacher_source, lessons, resumed)
    return Resolved(loaded, stage, world, wanted.shape, teacher, *found, tokenizer, template, wanted.budget)


def _chats(config: Config, stage: str) -> bool:
    """Whether the data are conversations."""
    return stage == "finetune" or config.finetune is not None


def _reads(config: Config, stage: str) -> dict[str, tuple[str, ...]]:
    unread = stage == "evaluate" and _chats(config, stage)
    return {"data.train": () if unread else config.data.train, "data.valid": config.data.valid}


def missing_data(loaded: Loaded, stage: str) -> list[str]:
    """Names the key of each file that is not there; what is wrong within a file is told by its own name."""
    look, problems = conversations_file if _chats(loaded.config, stage) else indexed.paths, []
    for key, paths in _reads(loaded.config, stage).items():
        for path in paths:
            try:
                look(path)
            except UserError as error:
                problems.append(f"{loaded.place(key)}: {error}")
    return problems


def _wanted(loaded: Loaded, stage: str, source: Source | None, teacher: ModelShape | None) -> Target:
    """The student in numbers: as given, as its checkpoint says, or as prune is to make it."""
    if stage == "prune" and teacher is not None:
        return target(loaded, teacher)
    student = loaded.config.student.model or (source.manifest.model if source else None)
    assert student is not None, "load refuses a student that has neither"
    return Target(student)


def _source(loaded: Loaded, key: str, checkpoint: str | None) -> Source | None:
    if checkpoint is None:
        return None
    try:
        folder = manifests.locate(checkpoint)
        return Source(folder, manifests.read(folder))
    except UserError as error:
        raise ConfigError([f"{loaded.place(key)}: {error}"]) from error


def _tokenizer(loaded: Loaded) -> Tokenizer:
    try:
        return open_tokenizer(loaded.config.data.tokenizer)
    except UserError as error:
        raise ConfigError([f"{loaded.place('data.tokenizer')}: {error}"]) from error


def _template(loaded: Loaded, stage: str, tokenizer: Tokenizer) -> Template | None:
    wanted = loaded.config.finetune
    if not _chats(loaded.config, stage):
        return None
    try:
        return open_template((wanted or Finetune()).template, tokenizer, loaded.config.data.tokenizer)
    except UserError as error:
        raise ConfigError([f"{loaded.place('finetune.template')}: {error}"]) from error


def _lessons(config: Config, stage: str, student: Source | None, teacher: Source | None) -> Lessons | None:
    """What a stage that trains learns from."""
    if stage in ("prune", "evaluate"):
        return None
    return Lessons(
        data=_names_and_sizes(config.data.train),
        weights=config.data.train_weights,
        student=Origin.of(student.folder, student.manifest) if student else None,
        teacher=Origin.of(teacher.folder, teacher.manifest) if teacher else None,
        objective=config.objective if teacher else None,
        packed=(config.finetune or Finetune()).packed if stage == "finetune" else None,
    )


def data_file(name: str) -> Path | None:
    """PREFIX.bin, or a file of conversations; None where it is not there."""
    return next((file for file in (Path(f"{name}.bin"), Path(name)) if file.is_file()), None)


def _names_and_sizes(datasets: tuple[str, ...]) -> tuple[str, ...] | None:
    files = [data_file(name) for name in datasets]
    if None in files:
        return None  # which is said when they are opened
    return tuple(f"{file.name} of {file.stat().st_size} bytes" for file in files if file)


def _vocabulary_problems(loaded: Loaded, student: ModelShape, source: Source | None, tokenizer: Tokenizer) -> list[str]:
    if tokenizer.vocab_size <= student.vocab or source is not None:  # a checkpoint knows its tokenizer
        return []
    path = loaded.config.data.tokenizer
    return [
        f"{loaded.place('data.tokenizer')}: {path} has {tokenizer.vocab_size} tokens but the student's "
        f"vocab is {student.vocab}; set student.model.vocab to {tokenizer.vocab_size} or more, or use the model's "
        "own tokenizer"
    ]


def _fingerprint_problems(loaded: Loaded, key: str, source: Source | None, tokenizer: Tokenizer) -> list[str]:
    if source is None or tokenizer.special_ids_of(source.manifest.tokenizer_fingerprint) is not None:
        return []
    theirs, ours = source.manifest.tokenizer_fingerprint[:12], tokenizer.fingerprint[:12]
    return [
        f"{loaded.place(key)}: {source.folder} was trained with tokenizer {source.manifest.tokenizer} ({theirs}), "
        f"but data.tokenizer is {loaded.config.data.tokenizer} ({ours}); their tokens differ, "
        "use the checkpoint's tokenizer"
    ]


def _length_problems(loaded: Loaded, teacher: Source | None) -> list[str]:
    """A teacher says little about positions it has never seen."""
    if teacher is None or loaded.config.teacher.longer_sequences:
        return []
    trained = max(teacher.manifest.sequence_length, teacher.manifest.model.max_positions or 0)
    length = loaded.config.data.sequence_length
    if length <= trained or trained == 1:  # a converted model may not say how long its sequences were
        return []
    return [
        f"{loaded.place('data.sequence_length')}: {length} is longer than the {trained} tokens that the teacher "
        f"{teacher.folder} was trained on; {trained} would do, or teacher.longer_sequences: true"
    ]
