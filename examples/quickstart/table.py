"""The last thing the quickstart prints: model, parameters, validation perplexity, tokens a second."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.models import size

NAMES = {
    "teacher": "teacher",
    "pruned": "student: pruned",
    "student": "student: pruned, distilled",
    "pruned_alone": "student: pruned, no teacher",
    "alone": "student: random, no teacher",
}


def main(runs: Path, names: list[str]) -> None:
    """Reads the runs' checkpoints, metrics and evaluations."""
    table = Table("model", box=None, pad_edge=False)
    for column in ("parameters", "non-embedding", "tokens seen", "valid loss", "perplexity", "bits a byte", "tokens/s"):
        table.add_column(column, justify="right")
    perplexity: dict[str, float] = {}
    for name in names:
        folder = run_directory.latest(runs / name)
        assert folder is not None, f"{name} has no checkpoint"
        facts = metadata.read(folder)
        result = json.loads((runs / f"evaluate_{name}" / "evaluation.json").read_text())
        perplexity[name] = result["valid_perplexity"]
        metrics = runs / name / "metrics.jsonl"  # trained models have one
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
        table.add_row(
            NAMES.get(name, name),
            f"{size.parameters(facts.model):,}",
            f"{size.non_embedding_parameters(facts.model):,}",
            f"{facts.tokens:,}" if speeds else "0",
            f"{result['valid_loss']:.4f}",
            f"{result['valid_perplexity']:.2f}",
            f"{result['bits_per_byte']:.4f}",
            f"{statistics.median(speeds):,.0f}" if speeds else "",
        )
    console = Console(width=120)
    console.print(table)
    if {"teacher", "student", "pruned_alone"} <= perplexity.keys():
        console.print(f"\n{in_words(perplexity)}", highlight=False)


def in_words(perplexity: dict[str, float]) -> str:
    """What the table compares.

    Args:
        perplexity: by the name of a run.
    """
    taught, alone, teacher = (perplexity[name] for name in ("student", "pruned_alone", "teacher"))
    result = (
        f"{taught:.1f} against {alone:.1f}: the teacher passes on some of what it has learnt from the other nine tenths"
        if taught < alone
        else f"{taught:.1f} against {alone:.1f}: this teacher was of no help"
    )
    return (
        "Perplexity of unseen reviews; lower is better. The teacher has read all reviews, the students a tenth. "
        "Two students start from the same pruned weights and read the same tokens; the distilled one learns the "
        f"teacher's distribution over the next token, the other one the next token. Result: {result} (it has "
        f"{teacher:.1f} itself)."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
