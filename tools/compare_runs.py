"""Compare training runs: one table, what differs in their configurations, and one picture of metrics over tokens.

    python tools/compare_runs.py runs/adapt runs/distill --out comparison
    python tools/compare_runs.py runs/* --out comparison --metrics loss,divergence,valid_loss

prints the tables and writes OUT/compare.html (one file with the picture in it, which needs no network) and
OUT/compare.png. A run that is still going can be compared, too. Metrics are the fields of metrics.jsonl; the horizontal
axis counts the tokens that a run has trained on. Lines of many steps are drawn as they are, and smoothed.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from megatron_capgap.common.errors import UserError, not_installed
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.config.loader import nearest
from megatron_capgap.runtime.metrics import complete_entries
from tools.command import run_tool

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    from megatron_capgap.law.formatting import short
    from megatron_capgap.law.html_page import page
    from megatron_capgap.law.plot import COLOURS, MARKERS
except ImportError as missing:
    print(f"compare_runs: error: {not_installed(str(missing.name).partition('.')[0], 'plot')}", file=sys.stderr)
    sys.exit(2)

METRICS = ("loss", "cross_entropy", "valid_loss")
NOT_COMPARED = ("run_dir",)
"""Configuration keys that differ in any two runs."""
SMOOTHED_FROM = 50
"""Number of points from which a line is also smoothed."""
SMOOTHING = 0.02
"""Share of a run's points on either side that a point of the smoothed line averages."""
TITLES = {
    "loss": "training loss, nats a token",
    "cross_entropy": "cross-entropy, nats a token",
    "divergence": "divergence, nats a token",
    "valid_loss": "held-out loss, nats a token",
    "bits_per_byte": "held-out loss, bits a byte",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens a second",
    "step_seconds": "seconds a step",
    "peak_memory_bytes": "peak memory, bytes",
}
Table = list[list[str]]
"""A header and rows."""


@dataclass(frozen=True)
class Run:
    """What a run directory holds."""

    name: str
    """Shortest end of its path that no other run shares."""
    config: dict[str, Any]
    """Leaves of resolved.yaml, by dotted key; empty if the file is missing."""
    entries: list[dict[str, Any]]
    """Lines of metrics.jsonl."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of training steps."""
        return [entry for entry in self.entries if "loss" in entry]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of evaluations."""
        return [entry for entry in self.entries if "valid_loss" in entry]

    def points(self, metric: str) -> list[tuple[int, float]]:
        """(tokens trained on, value) of each line that has the metric."""
        totals = dict(zip([0, *(s["step"] for s in self.steps)], accumulate([0, *_tokens(self.steps)]), strict=True))
        found, tokens = [], 0
        for entry in self.entries:
            tokens = totals.get(entry["step"], tokens)  # of a skipped batch: those before it
            if isinstance(entry.get(metric), int | float):
                found.append((tokens, float(entry[metric])))
        return found


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 with one line on stderr for invalid input; 130 after Ctrl-C."""
    args = parse_arguments(argv)
    return run_tool("compare_runs", lambda: compare(args.runs, args.out, args.metrics), place=str(args.out))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory of a training stage")
    parser.add_argument("--out", type=Path, required=True, help="folder of compare.html and compare.png")
    names = lambda text: tuple(filter(None, text.split(",")))  # noqa: E731
    parser.add_argument("--metrics", type=names, help=f"fields to draw, with commas (default {','.join(METRICS)})")
    return parser.parse_args(argv)


def compare(folders: Sequence[Path], out: Path, metrics: Sequence[str] | None = None) -> int:
    """Prints the tables and writes the page and the picture; returns 0.

    Args:
        folders: run directories.
        out: folder to write into; it is created.
        metrics: fields of metrics.jsonl to draw; None: those of `METRICS` that a run has.

    Raises:
        UserError: a folder is not a training run, or no run has a metric.
    """
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    there = sorted({key for run in runs for entry in run.entries for key in entry} - {"step", "time"})
    for metric in metrics or ():
        if not any(run.points(metric) for run in runs):
            near = nearest(metric, there)
            hint = f"did you mean {near}? " if near else ""
            raise UserError(f"--metrics: no run has {metric}; {hint}valid values: {', '.join(there)}")
    chosen = metrics or [metric for metric in METRICS if any(run.points(metric) for run in runs)]
    tables = {"Results": results(runs), "Configuration": differences(runs)}
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, chosen, out / "compare.png")
    write_atomically(out / "compare.html", page(as_markdown(runs, tables), out))
    for title, table in tables.items():
        print(f"{title}\n{as_text(table)}\n")
    print(f"wrote {out}/compare.html and {out}/compare.png")
    return 0


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest end of each path that tells it from the others.

    Raises:
        UserError: two of the paths are one folder.
    """
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"RUN: {path} is given twice; name each run once")
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


def read_run(folder: Path, name: str) -> Run:
    """Reads a run directory.

    Raises:
        UserError: it is none, or holds no training step.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no metrics.jsonl; expected the run directory of adapt, distill or finetune")
    resolved = folder / "resolved.yaml"
    try:
        config = yaml.safe_load(resolved.read_text(encoding="utf-8")) if resolved.is_file() else {}
    except yaml.YAMLError as error:
        raise UserError(f"{resolved}: not YAML ({' '.join(str(error).split())}); restore it, or remove it") from error
    run = Run(name, dict(leaves(config)), complete_entries(folder))
    if not run.steps:
        raise UserError(f"{folder}/metrics.jsonl: no training step; wait for the first one, or leave this run out")
    return run


def leaves(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as JSON) of each value that is not a section."""
    if isinstance(config, dict) and config:
        for name, value in config.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, config if isinstance(config, str) else json.dumps(config)


def results(runs: Sequence[Run]) -> Table:
    """Steps, tokens, losses, speed and memory of each run."""
    header = ["run", "steps", "tokens", "last loss", "lowest loss", "last held-out", "best held-out", "step"]
    table = [[*header, "tokens/s", "peak GiB"]]
    for run in runs:
        losses, steps = [step["loss"] for step in run.steps], run.config.get("train.steps", "null")
        best = min(run.evaluations, key=lambda entry: entry["valid_loss"], default=None)
        # The first step of a process is slower.
        speeds = [s["tokens_per_second"] for s in run.steps[1:] or run.steps if "tokens_per_second" in s]
        peaks = [step["peak_memory_bytes"] for step in run.steps if "peak_memory_bytes" in step]
        table.append(
            [
                run.name,
                f"{run.steps[-1]['step']}" + (f" of {steps}" if steps != "null" else ""),
                short(sum(_tokens(run.steps))),
                f"{losses[-1]:.4f}",
                f"{min(losses):.4f}",
                f"{run.evaluations[-1]['valid_loss']:.4f}" if best else "-",
                f"{best['valid_loss']:.4f}" if best else "-",
                f"{best['step']}" if best else "-",
                f"{statistics.median(speeds):,.0f}" if speeds else "-",
                f"{max(peaks) / 2**30:.2f}" if peaks else "-",
            ]
        )
    return table


def differences(runs: Sequence[Run]) -> Table:
    """The configuration keys in which the runs differ; "-" where a run does not have the key."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in NOT_COMPARED)
    table = [["key", *(run.name for run in runs)]]
    for key in keys:
        values = [run.config.get(key, "-") for run in runs]
        if len({"null" if value == "-" else value for value in values}) > 1:
            table.append([key, *values])
    return table


def draw(runs: Sequence[Run], metrics: Sequence[str], path: Path) -> None:
    """One panel for each metric, over the tokens that each run has trained on."""
    columns = min(2, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.8 * rows), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: needs no display
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, metric in zip(panels, metrics, strict=False):
        for number, run in enumerate(runs):
            if points := run.points(metric):
                _draw_line(axes, points, run.name, number)
        axes.set_xlabel("tokens")
        axes.set_ylabel(TITLES.get(metric, metric))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def _draw_line(axes: Axes, points: Sequence[tuple[int, float]], name: str, number: int) -> None:
    tokens, values = zip(*points, strict=True)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    look: dict[str, Any] = {"color": colour, "linewidth": 1.5, "label": name}
    if len(points) < SMOOTHED_FROM:
        axes.plot(tokens, values, marker=marker, markersize=4, **look)
        return
    axes.plot(tokens, values, color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(tokens, smoothed(values), marker=marker, markevery=max(1, len(points) // 8), markersize=4, **look)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and as many on either side, fewer towards the ends: a straight line stays where it is."""
    sums, most = [0.0, *accumulate(values)], int(SMOOTHING * len(values))
    reaches = [min(most, at, len(values) - 1 - at) for at in range(len(values))]
    return [(sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1) for at, reach in enumerate(reaches)]


def as_markdown(runs: Sequence[Run], tables: dict[str, Table]) -> str:
    """The page, with its picture between the tables."""
    (first, table), (second, keys) = tables.items()
    title = "Comparison of " + ("one run" if len(runs) == 1 else f"{len(runs)} runs")
    rest = _markdown_table(keys) if len(keys) > 1 else "The configurations are the same."
    smooth = any(len(run.steps) >= SMOOTHED_FROM for run in runs)
    note = "Pale lines are steps as they are, strong ones the mean of the steps around each." if smooth else ""
    parts = [f"# {title}", f"## {first}", _markdown_table(table), "![metrics over tokens](compare.png)", note]
    return "\n\n".join([*parts, f"## {second}", rest, ""])


def _markdown_table(table: Table) -> str:
    rows = [[html.escape(cell).replace("|", "&#124;").replace("_", "&#95;") for cell in row] for row in table]
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|---" * len(table[0]) + "|", *body])


def as_text(table: Table) -> str:
    """The table in columns."""
    if len(table) == 1:
        return "the same in all runs"
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _tokens(steps: Sequence[dict[str, Any]]) -> list[int]:
    return [step.get("tokens", 0) for step in steps]


if __name__ == "__main__":
    sys.exit(main())
