"""From a configuration to the plan of a run: reads checkpoint metadata, validates everything, reports all mistakes
together. Imports no torch, writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.checkpoint.metadata import ModelRef, Provenance
from megatron_capgap.common.errors import ConfigError, UserError
from megatron_capgap.config import derived
from megatron_capgap.config.finetune import FinetuneConfig
from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.config.schema import Config, ModelShape
from megatron_capgap.config.validation import checks
from megatron_capgap.data import indexed
from megatron_capgap.data.chat_template import Template, open_template
from megatron_capgap.data.conversation_files import conversations_file
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from megatron_capgap.pruning.student_shape import Budget, StudentTarget, student_target
from megatron_capgap.stages.plan import (
    CheckpointSource,
    DistillationPlan,
    Outline,
    PruningPlan,
    RunPlan,
    files_read,
    reads_conversations,
)
from megatron_capgap.stages.resume_checks import check_resume

T = TypeVar("T")


def resolve(loaded: LoadedConfig, stage: str, world: int, capability: tuple[int, int] | None = None) -> RunPlan:
    """Validates everything but the contents of the data; returns the plan of the run: a `DistillationPlan` with a
    teacher, a `PruningPlan` for prune, otherwise a `RunPlan`.

    Args:
        loaded: the configuration.
        stage: the stage to run.
        world: number of ranks, including those of a disjoint teacher.
        capability: compute capability of the GPUs; None skips its checks.

    Raises:
        UserError: with all problems.
    """
    config, problems = loaded.config, list[str]()

    def attempt(work: Callable[[], T]) -> T | None:
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
    teacher = teacher_source.meta.model if teacher_source else None
    target = attempt(lambda: _student_target(loaded, stage, student_source, teacher)) if found_models else None
    if target:
        attempt(lambda: checks.check(loaded, stage, world, target.shape, teacher, capability))
    if target and tokenizer:
        problems += _vocabulary_problems(loaded, target.shape, student_source, tokenizer)
        problems += _fingerprint_problems(loaded, "student.checkpoint", student_source, tokenizer)
        problems += _fingerprint_problems(loaded, "teacher.checkpoint", teacher_source, tokenizer)
        problems += _length_problems(loaded, teacher, teacher_source)
    if problems:  # data files are otherwise checked later, on rank 0
        raise ConfigError([*problems, *missing_data(loaded, stage)])
    assert target and tokenizer
    provenance = _provenance(config, stage, student_source, teacher_source)
    resume_metadata = check_resume(loaded, stage, world, target, teacher, tokenizer, template, provenance)
    plan = RunPlan(
        loaded=loaded,
        stage=stage,
        world=world,
        student=target.shape,
        student_source=student_source,
        provenance=provenance,
        resume_metadata=resume_metadata,
        tokenizer=tokenizer,
        template=template,
    )
    return _with_teacher(plan, teacher_source, target.budget)


def outline(loaded: LoadedConfig, stage: str, world: int, capability: tuple[int, int] | None = None) -> Outline:
    """As `resolve`, for a run described by numbers: neither the tokenizer nor the data need to exist."""
    config = loaded.config
    student_source = _source(loaded, "student.checkpoint", config.student.checkpoint)
    teacher_source = _source(loaded, "teacher.checkpoint", config.teacher.checkpoint if config.teacher else None)
    teacher = teacher_source.meta.model if teacher_source else config.teacher.model if config.teacher else None
    target = _student_target(loaded, stage, student_source, teacher)
    checks.check(loaded, stage, world, target.shape, teacher, capability)
    if problems := _length_problems(loaded, teacher, teacher_source):
        raise ConfigError(problems)
    return Outline(
        loaded=loaded,
        stage=stage,
        world=world,
        student=target.shape,
        student_source=student_source,
        teacher=teacher,
        teacher_source=teacher_source,
        budget=target.budget,
    )


def described_by_numbers(loaded: LoadedConfig) -> bool:
    """Whether numbers stand in for a checkpoint, or for a student whose tokenizer is not here."""
    config = loaded.config
    if config.teacher is not None:
        return config.teacher.model is not None
    return config.student.model is not None and not Path(config.data.tokenizer).exists()


def shape_of_student(found: Outline, loaded: LoadedConfig) -> ModelShape:
    """Shape of the student under a changed configuration, on which that of a pruned student depends.

    Raises:
        ConfigError: the student cannot be pruned as configured.
    """
    return _student_target(loaded, found.stage, found.student_source, found.teacher).shape


def _with_teacher(plan: RunPlan, source: CheckpointSource | None, budget: Budget | None) -> RunPlan:
    """The plan as one of the kinds that have a teacher; as it is where there is none."""
    if source is None:
        return plan
    facts = vars(plan) | {"teacher": source.meta.model, "teacher_source": source}
    if plan.stage == "prune":
        return PruningPlan(**facts | {"budget": budget})
    return DistillationPlan(**facts)


def check_device(plan: RunPlan, capability: tuple[int, int] | None) -> None:
    """Checks requirements on the GPUs that were found.

    Raises:
        ConfigError: the GPUs do not meet them.
    """
    checks.check(plan.loaded, plan.stage, plan.world, plan.student, plan.teacher, capability)


def missing_data(loaded: LoadedConfig, stage: str) -> list[str]:
    """One problem per missing data file, with its key; errors within a file are reported when it is opened."""
    look, problems = conversations_file if reads_conversations(loaded.config, stage) else indexed.paths, []
    for key, paths in files_read(loaded.config, stage).items():
        for path in paths:
            try:
                look(path)
            except UserError as error:
                problems.append(f"{loaded.location(key)}: {error}")
    return problems


def _student_target(
    loaded: LoadedConfig, stage: str, source: CheckpointSource | None, teacher: ModelShape | None
) -> StudentTarget:
    """Shape of the student: as configured, as in its checkpoint, or as prune is to create it."""
    if stage == "prune" and teacher is not None:
        return student_target(loaded, teacher)
    student = loaded.config.student.model or (source.meta.model if source else None)
    assert student is not None, "guaranteed by config.loader"
    return StudentTarget(student)


def _source(loaded: LoadedConfig, key: str, checkpoint: str | None) -> CheckpointSource | None:
    if checkpoint is None:
        return None
    try:
        folder = run_directory.locate(checkpoint)
        return CheckpointSource(folder, metadata.read(folder))
    except UserError as error:
        raise ConfigError([f"{loaded.location(key)}: {error}"]) from error


def _tokenizer(loaded: LoadedConfig) -> Tokenizer:
    try:
        return open_tokenizer(loaded.config.data.tokenizer)
    except UserError as error:
        raise ConfigError([f"{loaded.location('data.tokenizer')}: {error}"]) from error


def _template(loaded: LoadedConfig, stage: str, tokenizer: Tokenizer) -> Template | None:
    finetune = loaded.config.finetune
    if not reads_conversations(loaded.config, stage):
        return None
    try:
        return open_template((finetune or FinetuneConfig()).template, tokenizer, loaded.config.data.tokenizer)
    except UserError as error:
        raise ConfigError([f"{loaded.location('finetune.template')}: {error}"]) from error


def _provenance(
    config: Config, stage: str, student: CheckpointSource | None, teacher: CheckpointSource | None
) -> Provenance | None:
    """Provenance of a stage that trains: data, models and objective."""
    if stage in ("prune", "evaluate"):
        return None
    return Provenance(
        data=_names_and_sizes(config.data.train),
        weights=config.data.train_weights,
        student=ModelRef.of(student.folder, student.meta) if student else None,
        teacher=ModelRef.of(teacher.folder, teacher.meta) if teacher else None,
        objective=config.objective if teacher else None,
        packed=(config.finetune or FinetuneConfig()).packed if stage == "finetune" else None,
    )


def data_file(name: str) -> Path | None:
    """PREFIX.bin, or a file of conversations; None if it does not exist."""
    return next((file for file in (Path(f"{name}.bin"), Path(name)) if file.is_file()), None)


def _names_and_sizes(datasets: tuple[str, ...]) -> tuple[str, ...] | None:
    files = [data_file(name) for name in datasets]
    if None in files:
        return None  # reported when the files are opened
    return tuple(f"{file.name} of {file.stat().st_size} bytes" for file in files if file)


def _vocabulary_problems(
    loaded: LoadedConfig, student: ModelShape, source: CheckpointSource | None, tokenizer: Tokenizer
) -> list[str]:
    if tokenizer.vocab_size <= student.vocab or source is not None:  # checkpoints: fingerprints are compared
        return []
    path = loaded.config.data.tokenizer
    return [
        f"{loaded.location('data.tokenizer')}: {path} has {tokenizer.vocab_size} tokens but the student's "
        f"vocab is {student.vocab}; set student.model.vocab to {tokenizer.vocab_size} or more, or use the model's "
        "own tokenizer"
    ]


def _fingerprint_problems(
    loaded: LoadedConfig, key: str, source: CheckpointSource | None, tokenizer: Tokenizer
) -> list[str]:
    if source is None or tokenizer.special_ids_of(source.meta.tokenizer_fingerprint) is not None:
        return []
    theirs, ours = source.meta.tokenizer_fingerprint[:12], tokenizer.fingerprint[:12]
    return [
        f"{loaded.location(key)}: {source.folder} was trained with tokenizer {source.meta.tokenizer} ({theirs}), "
        f"but data.tokenizer is {loaded.config.data.tokenizer} ({ours}); their tokens differ, "
        "use the checkpoint's tokenizer"
    ]


def _length_problems(loaded: LoadedConfig, teacher: ModelShape | None, source: CheckpointSource | None) -> list[str]:
    """A teacher's predictions are unreliable at positions beyond its training length."""
    if teacher is None or derived.teacher_section(loaded.config).longer_sequences:
        return []
    trained = max(source.meta.sequence_length if source else 1, teacher.max_positions or 0)
    length = loaded.config.data.sequence_length
    if length <= trained or trained == 1:  # converted models may lack their training length
        return []
    whose = str(source.folder) if source else "of teacher.model"
    return [
        f"{loaded.location('data.sequence_length')}: {length} is longer than the {trained} tokens that the teacher "
        f"{whose} was trained on; use at most {trained}, or set teacher.longer_sequences: true"
    ]
