"""Checks that a resumed run matches its checkpoint. Imports no torch, writes nothing."""

from __future__ import annotations

from pathlib import Path

from megatron_capgap.checkpoint import run_directory
from megatron_capgap.checkpoint.metadata import CheckpointMetadata, ModelRef, Provenance
from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config import derived
from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.config.schema import LayerPair, ModelShape
from megatron_capgap.data.chat_template import Template
from megatron_capgap.data.tokenizer import Tokenizer
from megatron_capgap.pruning.student_shape import UNDECIDED, StudentTarget


def check_resume(
    loaded: LoadedConfig,
    stage: str,
    world: int,
    target: StudentTarget,
    teacher: ModelShape | None,
    tokenizer: Tokenizer,
    template: Template | None,
    provenance: Provenance | None,
) -> CheckpointMetadata | None:
    """Metadata of the run's own newest checkpoint; None if it has none.

    Args:
        loaded, stage, world: the run and its number of ranks.
        target: the student.
        teacher: shape of the teacher.
        tokenizer, template: used to read the data.
        provenance: of this start: data, models and objective.

    Raises:
        ConfigError: one line per mismatch between the run and its checkpoint.
    """
    config = loaded.config
    where = f"{loaded.location('run_dir')}: {config.run_dir}"
    if stage == "evaluate" and run_directory.is_training_run(Path(config.run_dir)):
        raise ConfigError([f"{where} is a training run; choose another run_dir for the evaluation"])
    found = run_directory.newest_readable(Path(config.run_dir))
    if found is None:
        return None
    problems = [
        *_model_mismatches(loaded, stage, found, target, teacher),
        *_data_mismatches(loaded, world, found, tokenizer, template),
        *_provenance_mismatches(loaded, stage, found, provenance),
    ]
    if config.train.steps is not None and found.step > config.train.steps:
        problems.append(
            f"{where} is at step {found.step}, beyond train.steps {config.train.steps}; "
            "raise train.steps or choose another run_dir"
        )
    if problems:
        raise ConfigError(problems)
    return found


def _model_mismatches(
    loaded: LoadedConfig, stage: str, found: CheckpointMetadata, target: StudentTarget, teacher: ModelShape | None
) -> list[str]:
    """Mismatches of stage, model shape and projections."""
    config, problems = loaded.config, []
    where = f"{loaded.location('run_dir')}: {config.run_dir}"
    if found.stage != stage:
        problems.append(f"{where} holds a run of stage {found.stage}; choose another run_dir for {stage}")
    for name, value in vars(target.shape).items():
        if getattr(found.model, name) != value and not (target.budget and name in UNDECIDED):
            was = getattr(found.model, name)
            problems.append(
                f"{where} holds a checkpoint with {name} {was}, this student has {name} {value}; choose another run_dir"
            )
    if target.budget and found.kept != target.kept:
        problems.append(
            f"{where} holds a student that keeps {found.kept} non-embedding parameters, this one is to keep "
            f"{target.kept}; choose another run_dir"
        )
    projections = derived.projection_names(config, target.shape, teacher)
    if found.provenance is None and found.projections != projections:
        was, now = (" ".join(names) or "none" for names in (found.projections, projections))
        problems.append(
            f"{loaded.location('objective.matching')}: {config.run_dir} was started with projections of layers {was}, "
            f"this start has {now}; keep objective.matching or choose another run_dir"
        )
    return problems


def _data_mismatches(
    loaded: LoadedConfig, world: int, found: CheckpointMetadata, tokenizer: Tokenizer, template: Template | None
) -> list[str]:
    """Mismatches of seed, sequence length, batch size, tokenizer and chat template."""
    config, problems = loaded.config, []
    where = f"{loaded.location('run_dir')}: {config.run_dir}"
    if found.seed != config.seed:
        problems.append(
            f"{where} was started with seed {found.seed}, not {config.seed}; keep the seed or choose another run_dir"
        )
    if found.sequence_length != config.data.sequence_length:
        problems.append(
            f"{where} has data.sequence_length {found.sequence_length}, this start has {config.data.sequence_length}; "
            "keep it or choose another run_dir"
        )
    batch = derived.global_batch(config, config.student.layout, derived.student_world(config, world))
    begun_with = found.tokens // (found.step * found.sequence_length) if found.step else batch
    if begun_with != batch:
        problems.append(
            f"{where} was started with global batch size {begun_with}, this start has {batch}; "
            f"set train.global_batch to {begun_with} or choose another run_dir"
        )
    if found.tokenizer_fingerprint != tokenizer.fingerprint:
        problems.append(
            f"{where} was started with another tokenizer ({found.tokenizer}); use it or choose another run_dir"
        )
    if template is not None and found.chat_template != template.jinja:
        place = loaded.location("finetune.template")
        problems.append(
            f"{place}: {config.run_dir} was started with another template; use it or choose another run_dir"
        )
    return problems


def _provenance_mismatches(
    loaded: LoadedConfig, stage: str, found: CheckpointMetadata, now: Provenance | None
) -> list[str]:
    """Mismatches of data, models and objective. Paths may differ if the content is the same."""
    was = found.provenance
    if was is None or now is None or found.stage != stage:
        return []
    rows = [(f"{role}.checkpoint", getattr(was, role), getattr(now, role)) for role in ("student", "teacher")]
    if was.packed is not None:
        rows.append(("finetune.packed", was.packed, now.packed))
    if was.data and now.data:
        rows.append(("data.train", was.data, now.data))
    rows.append(("data.train_weights", was.weights, now.weights))
    if was.objective and now.objective:
        mine = vars(now.objective)
        rows += [(f"objective.{name}", before, mine[name]) for name, before in vars(was.objective).items()]
    return [
        f"{loaded.location(key)}: {loaded.config.run_dir} was started with {_shown(before)}, this start has "
        f"{_shown(after)}; restore the former or choose another run_dir"
        for key, before, after in rows
        if not (before.same(after) if isinstance(before, ModelRef) else before == after)
    ]


def _shown(value: object) -> str:
    if isinstance(value, ModelRef):
        return f"{value.checkpoint} ({value.step} steps, {value.tokens} tokens)"
    if isinstance(value, LayerPair):
        return f"{value.name} x {value.weight:g}"
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value)) or "none"
    return "none" if value is None else str(value)
