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
    "random": "student: random",
    "alone": "student: random, no teacher",
}
SHAPE_OF = {"random": "alone"}  # weights that were never written


def main(runs: Path, names: list[str]) -> None:
    """Reads the runs' checkpoints, metrics and evaluations."""
    table = Table("model", box=None, pad_edge=False)
    for column in ("parameters", "non-embedding", "tokens seen", "valid loss", "perplexity", "bits a byte", "tokens/s"):
        table.add_column(column, justify="right")
    for name in names:
        folder = run_directory.latest(runs / SHAPE_OF.get(name, name))
        assert folder is not None, f"{name} has no checkpoint"
        facts = metadata.read(folder)
        result = json.loads((runs / f"evaluate_{name}" / "evaluation.json").read_text())
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
    Console(width=120).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
