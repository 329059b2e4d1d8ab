"""Reads RUN/metrics.jsonl, and truncates it when a run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_capgap.common.fileio import write_atomically


def evaluation_after(run_dir: Path, step: int) -> dict[str, Any] | None:
    """Last entry of metrics.jsonl with the held-out loss after a step; None if there is none. Rank 0 only."""
    path = run_dir / "metrics.jsonl"
    entries = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    found = [entry for entry in entries if entry["step"] == step and "valid_loss" in entry]
    return found[-1] if found else None


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    """(step, held-out loss) of every evaluation in metrics.jsonl, in file order. Rank 0 only."""
    path = run_dir / "metrics.jsonl"
    entries = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [(entry["step"], entry["valid_loss"]) for entry in entries if "valid_loss" in entry]


def complete_entries(run_dir: Path) -> list[dict[str, Any]]:
    """All entries of metrics.jsonl but an incomplete last line, which a running or killed run may leave."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def drop_metrics_after(run_dir: Path, step: int) -> None:
    """Removes entries after `step`, which a killed run wrote beyond its last checkpoint, and incomplete lines. Rank 0
    only."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_atomically(path, "".join(kept))
