"""Record of a finished distillation for the law: RUN/record.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from megatron_capgap.checkpoint import run_directory
from megatron_capgap.checkpoint.metadata import ModelRef
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.config import derived
from megatron_capgap.config.schema import Config, ObjectiveConfig
from megatron_capgap.law.records import Record
from megatron_capgap.models import size
from megatron_capgap.runtime.metrics import evaluation_after
from megatron_capgap.stages.plan import CheckpointSource, DistillationPlan

RECORD = "record.json"


def write(plan: DistillationPlan) -> str:
    """Writes the record of a complete run; a stopped run has no record. Rank 0 only.

    Returns:
        Message for the user.
    """
    run_dir, steps = Path(plan.config.run_dir), plan.config.train.steps
    if (
        plan.resume_metadata is not None
        and plan.resume_metadata.step == steps
        and _tokens(run_dir / RECORD) == _total_tokens(plan)
    ):
        return f"record for the law: {run_dir / RECORD}, unchanged"
    if not plan.config.data.valid:
        return "no record for the law: data.valid is empty"
    assert steps is not None, "set by stage_context"
    # Read from disk: the run may have been stopped between its last evaluation and the record.
    last = evaluation_after(run_dir, steps)
    if last is None or steps not in run_directory.steps_in(run_dir):
        return "no record for the law yet: the run is incomplete"
    record = describe(plan, last["valid_loss"], last.get("valid_tokens"))
    write_atomically(run_dir / RECORD, record.line())
    return f"record for the law: {run_dir / RECORD}"


def describe(plan: DistillationPlan, valid_loss: float, valid_tokens: int | None) -> Record:
    """The record of a complete distillation."""
    config, student, teacher, source = plan.config, plan.student, plan.teacher, plan.teacher_source
    tokens, taught = _total_tokens(plan), derived.teacher_runs(config, plan.stage)
    return Record(
        student_params=plan.student_non_embedding_params,
        teacher_params=source.meta.kept,
        student_params_total=size.embedding_parameters(student) + plan.student_non_embedding_params,
        teacher_params_total=size.embedding_parameters(teacher) + source.meta.kept,
        family=student.family,
        tokens=tokens,
        seed=config.seed,
        init=_student_init(plan),
        valid_loss=valid_loss,
        objective=objective_text(config.objective),
        flops=tokens * size.training_flops(student, teacher if taught else None, config.data.sequence_length),
        config_hash=fingerprint(config),
        teacher_tokens=source.meta.tokens,
        teacher_valid_loss=_loss_of(source),
        valid_tokens=valid_tokens,
        tokenizer=plan.tokenizer.fingerprint[:16],
        teacher_seed=source.meta.seed,
        taught=taught,
    )


def _total_tokens(plan: DistillationPlan) -> int:
    """Training tokens of the whole run."""
    assert plan.config.train.steps is not None
    return plan.config.train.steps * plan.global_batch * plan.config.data.sequence_length


def _tokens(record: Path) -> int | None:
    """Training tokens of an existing record, whose run may have been shorter; None if there is none."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _student_init(plan: DistillationPlan) -> str:
    """Initialisation of the student: random, fixed, pruned or pruned_other."""
    if plan.student_source is None:
        return "random"
    origin, source = plan.student_source.meta.pruned_from, plan.teacher_source
    if origin is None or source is None or origin.model != plan.teacher:
        return "fixed"
    content = ModelRef.of(source.folder, source.meta).content
    return "pruned" if None in (content, origin.content) or content == origin.content else "pruned_other"


def _loss_of(source: CheckpointSource) -> float | None:
    """Held-out loss that a checkpoint's own run measured after its step; None if it did not."""
    run_dir = source.folder.parents[1]
    found = evaluation_after(run_dir, source.meta.step)
    return found["valid_loss"] if found else None


def fingerprint(config: Config) -> str:
    """Hash of the resolved configuration without run_dir and student.recompute: equal for equivalent runs."""
    content = {name: value for name, value in asdict(config).items() if name != "run_dir"}
    del content["student"]["recompute"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def objective_text(objective: ObjectiveConfig) -> str:
    """The objective as a weighted sum, with the parameters of its divergence."""
    details = [f"temperature {objective.temperature:g}"] if objective.temperature != 1.0 else []
    if objective.divergence.startswith("skew"):
        details.append(f"alpha {objective.skew_alpha:g}")
    if objective.divergence == "jsd":
        details.append(f"beta {objective.jsd_beta:g}")
    divergence = objective.divergence + (f" ({', '.join(details)})" if details else "")
    terms = [(objective.divergence_weight, divergence), (objective.cross_entropy_weight, "cross_entropy")]
    terms += [(pair.weight, f"layers {pair.name}") for pair in objective.matching]
    return " + ".join(f"{weight:g} {term}" for weight, term in terms if weight)
