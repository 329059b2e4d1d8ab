"""Model card of an exported model, from its run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.conversion.family import Family
from megatron_capgap.conversion.importing import STAGE
from megatron_capgap.models import size

EXPORTED = "Exported with megatron_capgap"
"""Text that identifies a folder exported by this project."""


def text(folder: Path, meta: CheckpointMetadata, family: Family, caution: str | None = None) -> str:
    """Builds README.md of an exported model.

    Args:
        folder: the checkpoint.
        meta: its metadata.
        family: its architecture.
        caution: a warning for users of the model.
    """
    shape = meta.model
    total, inner = size.parameters(shape), size.non_embedding_parameters(shape)
    tags = [family.name, *(["distillation"] if meta.stage == "distill" else [])]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [*(f"- {tag}" for tag in tags), "---", "", f"# {folder.parents[1].resolve().name}", ""]
    lines += [f"A {family.name} model with {total:,} parameters, {inner:,} without embeddings:"]
    lines += [f"{shape.layers} layers, hidden size {shape.hidden}, vocabulary {shape.vocab}.", ""]
    if meta.padding:
        lines += [f"{meta.padding:,} of them are zero: they pad layers that were pruned to different sizes.", ""]
    lines += [f"{caution}.", ""] if caution else []
    if meta.stage == STAGE:
        lines += [f"{EXPORTED}; its weights were imported before, and not trained.", ""]
    else:
        lines += [
            f"{EXPORTED} from step {meta.step} of a run of the stage {meta.stage}.",
            "",
        ]
        facts = _facts(folder.parents[1], meta)
        lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    return "\n".join(lines)


def _facts(run_dir: Path, meta: CheckpointMetadata) -> dict[str, str]:
    """Facts about the run, by name."""
    facts = {
        "tokens trained on": f"{meta.tokens:,}",
        "sequence length": f"{meta.sequence_length:,}",
        "steps": f"{meta.step:,} of {meta.steps:,}",
        "seed": str(meta.seed),
    }
    resolved = _resolved(run_dir)
    if teacher := (resolved.get("teacher") or {}).get("checkpoint"):
        facts |= _teacher(teacher, meta)
        objective = resolved["objective"]
        facts["objective"] = (
            f"{objective['divergence_weight']} x {objective['divergence']} at temperature {objective['temperature']} + "
            f"{objective['cross_entropy_weight']} x cross-entropy"
        )
    if rate := (resolved.get("optimizer") or {}).get("lr"):
        facts["peak learning rate"] = str(rate)
    names = {"loss": "training loss", "cross_entropy": "training cross-entropy", "divergence": "training divergence"}
    names |= {"valid_loss": "held-out loss", "valid_perplexity": "held-out perplexity"}
    last = _last_numbers(run_dir, meta.step)
    return facts | {words: f"{last[name]:.4f}" for name, words in names.items() if name in last}


def _teacher(checkpoint: str, meta: CheckpointMetadata) -> dict[str, str]:
    """The teacher's name and, if its checkpoint still exists, its size."""
    facts = {"teacher": f"`{Path(checkpoint).name}`"}
    try:
        inner = metadata.read(run_directory.locate(checkpoint)).kept
    except UserError:  # the teacher may have been deleted after the run
        return facts
    ratio = inner / meta.kept
    return facts | {"teacher's parameters": f"{inner:,} without embeddings, {ratio:.2f} times the student's"}


def _resolved(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "resolved.yaml"
    try:
        return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
    except yaml.YAMLError as error:
        raise UserError(
            f"{file}: is damaged ({in_one_line(error)}); remove it to export with a shorter model card"
        ) from None


def _last_numbers(run_dir: Path, step: int) -> dict[str, float]:
    """The last value of each metric up to the checkpoint's step."""
    file = run_dir / "metrics.jsonl"
    last: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # incomplete last line of a killed run
            continue
        if isinstance(entry, dict) and entry.get("step", step + 1) <= step:
            last |= entry
    return last
