"""The last thing the quickstart prints: model, parameters, validation perplexity, tokens a second."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_capgap.checkpoint import manifest
from megatron_capgap.models import size

NAMES = {
    "teacher": "teacher",
    "student": "student, distilled",
    "alone": "student, without teacher",
}


def main(runs: Path, names: list[str]) -> None:
    """Reads the runs' checkpoints, metrics and evaluations."""
    table = Table("model", box=None, pad_edge=False)
    for column in ("parameters", "non-embedding", "tokens seen", "valid perplexity", "bits a byte", "tokens/s"):
        table.add_column(column, justify="right")
    for name in names:
        folder = manifest.latest(runs / name)
        assert folder is not None, f"{name} has no checkpoint"
        facts = manifest.read(folder)
        result = json.loads((runs / f"evaluate_{name}" / "evaluation.json").read_text())
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        speed = statistics.median(line["tokens_per_second"] for line in lines if "loss" in line)
        table.add_row(
            NAMES.get(name, name),
            f"{size.parameters(facts.model):,}",
            f"{size.non_embedding_parameters(facts.model):,}",
            f"{facts.tokens:,}",
            f"{result['valid_perplexity']:.2f}",
            f"{result['bits_per_byte']:.4f}",
            f"{speed:,.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
