"""Text of `--help` and of the configuration reference, generated from the schema's docstrings. Imports no torch."""

import textwrap

from megatron_capgap.config.fields import Field, join, table
from megatron_capgap.config.loader import STAGE_REQUIREMENTS

WIDTH = 100

STAGES = {
    "adapt": "train a model on next-token prediction, from random weights or from a checkpoint",
    "prune": "prune a student from a teacher: keep the most important heads, neurons, channels and layers",
    "distill": "train a student to match the next-token distributions of a teacher",
    "finetune": "train a model on the assistant turns of conversations, with or without a teacher",
    "evaluate": "measure loss, perplexity and bits per byte on held-out data",
}
OPTIONS = {
    "--config FILE": "YAML configuration file",
    "--section.key=value": "set one key, the value in YAML; overrides the file",
    "--check": "validate all but the contents of the data, print parameters, ranks and memory, and exit",
    "--check-world N": "as --check, for a world size of N, in one process",
    "--check-capability X.Y": "as --check, for GPUs of this compute capability (9.0: H100), which FP8 recipes require",
    "--gpu NAME|GIB": "as --check; say whether the run fits h100-80, h200, a100-80 or that many GiB, and its time",
    "--utilisation X": "share of the GPU's peak that matrix products reach, for the predicted times (default 0.4)",
    "--gpu-hour-price X": "price of a GPU for an hour, for the predicted cost",
    "--plan N": "search layouts, micro-batches and recomputation for N GPUs; print the best five and exit",
    "--help, -h": "print this text; after STAGE: describe every configuration key",
    "--version": "print the version",
}


def overview() -> str:
    """Text of `--help`: stages and options, one line each."""
    return "\n".join(
        [
            "capgap: pruning and distillation of language models on Megatron-Core",
            "",
            *_usage("STAGE"),
            "",
            "stages",
            *_columns(STAGES),
            "",
            "options",
            *_columns(OPTIONS),
            "",
            "`capgap launch -n N STAGE ...` starts N ranks on this node, as torchrun does.",
            "`python -m megatron_capgap STAGE --help` describes every configuration key.",
            "",
        ]
    )


def stage_help(stage: str) -> str:
    """Text of `STAGE --help`: usage, and every key with type, default and meaning.

    Args:
        stage: a name from `schema.STAGES`.
    """
    needs = STAGE_REQUIREMENTS[stage]
    lines = [f"capgap {stage}: {STAGES[stage]}", "", *_usage(stage), "", "options", *_columns(OPTIONS), ""]
    free = needs.student and "student.checkpoint" not in needs.required
    model = "student.checkpoint or student.model, and " if free else ""
    lines += [f"{stage} requires {model}{', '.join(needs.required)}.", ""]
    lines += ["configuration keys, by section", "", *_section(table()[""], stage)]
    return "\n".join(lines)


def reference() -> str:
    """Configuration reference in Markdown: one table per section."""
    lines = []
    for section in (key for key in table().values() if key.children):
        keys = [table()[join(section.name, child)] for child in section.children]
        unread = [stage for stage in STAGES if section.name in STAGE_REQUIREMENTS[stage].unread]
        lines += [f"## {section.name or 'Top level'}", "", section.doc]
        lines += [f"Not read by {', '.join(unread)}." if unread else "", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys:
            name, default = key.name.rpartition(".")[2], f"`{key.default}`" if key.default else ""
            link = f"[`{name}`](#{key.name.replace('.', '')})" if key.children else f"`{name}`"
            cells = [link, key.type, "required" if key.required else default, " ".join(key.doc.split())]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _usage(stage: str) -> list[str]:
    command = f"megatron_capgap {stage} --config FILE [--section.key=value ...]"
    return [
        "usage",
        f"  python -m {command} [--check] [--check-world N]",
        f"  torchrun --nproc-per-node RANKS -m {command}",
        f"  srun --ntasks RANKS --kill-on-bad-exit=1 python -m {command}",
    ]


def _columns(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]


def _section(section: Field, stage: str) -> list[str]:
    """Help lines of a section: its values, then its subsections."""
    keys = [table()[join(section.name, child)] for child in section.children]
    lines = []
    if section.name:
        default = f" (default {section.default})" if section.default else ""
        unread = f" Not read by {stage}." if section.name in STAGE_REQUIREMENTS[stage].unread else ""
        lines += _wrapped(f"{section.name}: {section.doc}{default}{unread}", 0)
    for key in keys:
        if not key.children:
            state = "required" if key.required else f"default {key.default}"
            lines += [*_wrapped(f"{key.name}: {key.type} ({state})", 2), *_wrapped(key.doc, 6)]
    lines.append("")
    for key in keys:
        if key.children:
            lines += _section(key, stage)
    return lines


def _wrapped(text: str, indent: int) -> list[str]:
    inside = " " * max(indent, 6)
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=inside, break_on_hyphens=False)
