"""Plots: loss against teacher size, location of the best teacher, loss against compute. Colours of Okabe and Ito, also
distinguished by markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megatron_capgap.law import cost, fit
from megatron_capgap.law.advice import Advice
from megatron_capgap.law.analysis import Analysis
from megatron_capgap.law.formatting import short
from megatron_capgap.law.verdict import INTERIOR, LEVEL, NOT_DETECTED, SATURATING, SMALLEST

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
VERDICTS = {
    INTERIOR: (COLOURS[0], "o"),
    SMALLEST: (COLOURS[1], "v"),
    SATURATING: (COLOURS[2], "^"),
    NOT_DETECTED: (COLOURS[6], "x"),
}
DPI = 200
NAMED = 12
"""Maximum number of catalogue teachers that are all labelled; of more, only those on the Pareto frontier are."""


def curse(study: Analysis, path: Path) -> None:
    """Loss against teacher size: each run as measured and without the random effect of its teacher's training; the
    posterior median and interval of each student."""
    figure, axes = _figure()
    cells, luck = study.process.cells, study.process.teachers()
    for number, found in enumerate(study.findings):
        colour, marker = _look(number)
        mine = cells.student == found.student
        axes.plot(cells.teacher[mine], cells.loss[mine], marker, color=colour, markersize=4, markeredgewidth=0)
        corrected = cells.loss[mine] - luck[cells.training[mine]]
        axes.plot(cells.teacher[mine], corrected, "+", color=colour, markersize=6, markeredgewidth=1)
        axes.fill_between(found.grid, found.curve[0], found.curve[2], color=colour, alpha=0.15, linewidth=0)
        label = f"{short(found.student)}: {found.verdict} ({found.probability:.2f})"
        if found.verdict == NOT_DETECTED:
            label = f"{short(found.student)}: {found.verdict}"
        axes.plot(found.grid, found.curve[1], color=colour, linewidth=1.5)
        axes.plot([], [], marker=marker, color=colour, markersize=5, linewidth=1.5, label=label)
    axes.plot([], [], "+", color=GREY, label="without the teacher's luck")
    axes.set_xscale("log")
    _sizes(axes.xaxis, cells.teacher.tolist())
    axes.set_xlabel(f"teacher parameters ({study.count})")
    axes.set_ylabel("student's validation loss, nats a token")
    _legend(axes, f"student: verdict, {_percent()} band")
    _save(figure, path)


def optimum(study: Analysis, path: Path) -> None:
    """Cumulative probability of the best ratio T / S, for each student."""
    figure, axes = _figure()
    for number, found in enumerate(study.findings):
        colour, marker = _look(number)
        ratios = found.grid / found.student
        every = max(len(ratios) // 8, 1)
        axes.plot(
            ratios,
            np.cumsum(found.optimum),
            label=short(found.student),
            color=colour,
            marker=marker,
            markevery=every,
            markersize=5,
            linewidth=1.4,
        )
    axes.axvline(fit.PAPER[0], linestyle="--", color=GREY, linewidth=1.2, label="paper: 2.498")
    axes.set_xscale("log")
    _ratios(axes.xaxis)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("T / S")
    axes.set_ylabel("probability that the best teacher is at or below")
    _legend(axes, "student")
    _save(figure, path)


def law(study: Analysis, path: Path, advice: Advice | None = None) -> None:
    """Best teacher against student size: posterior medians with intervals, the range of teachers, the paper's slope."""
    figure, axes = _figure()
    sizes = [found.student for found in study.findings]
    reach = np.geomspace(min(sizes) / 1.4, max(sizes) * 1.4, 100)
    axes.plot(reach, fit.PAPER[0] * reach, "--", color=GREY, linewidth=1.2, label="paper's slope: 2.498 S")
    axes.plot(reach, reach, ":", color=GREY, linewidth=1.2, label="T = S")
    shown: set[str] = set()
    for found in study.findings:
        colour, marker = VERDICTS[found.verdict]
        axes.plot([found.student] * 2, found.grid[[0, -1]], color=GREY, linewidth=4, alpha=0.18, solid_capstyle="butt")
        label = found.verdict if found.verdict not in shown else None
        shown.add(found.verdict)
        axes.errorbar(
            found.student,
            found.best,
            _bars(found.best, found.interval),
            label=label,
            fmt=marker,
            color=colour,
            markersize=7,
            capsize=4,
            linewidth=1.4,
        )
    axes.plot([], [], color=GREY, linewidth=4, alpha=0.3, label="teachers looked at")
    if advice is not None and advice.best is not None and advice.interval is not None:
        axes.errorbar(
            advice.student,
            advice.best,
            _bars(advice.best, advice.interval),
            label="asked for",
            fmt="*",
            color=COLOURS[2],
            markersize=11,
            capsize=4,
            markeredgecolor="black",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _sizes(axes.xaxis, sizes)
    _sizes(axes.yaxis, [size for found in study.findings for size in found.grid[[0, -1]]])
    axes.set_xlabel(f"student parameters ({study.count})")
    axes.set_ylabel(f"best teacher, parameters, {_percent()} interval")
    _legend(axes, "law" if study.law else "no law identified")
    _save(figure, path)


def causes(study: Analysis, path: Path) -> None:
    """Effects of the initialisation and of teaching against teacher size, one panel each."""
    figure = Figure(figsize=(6.4, 6.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, sharex=True)
    titles = ("loss on labels alone, nats a token", "gain by teaching, nats a token")
    for axes, title in zip(panels, titles, strict=True):
        _plain(axes)
        axes.set_ylabel(title)
    for number, each in enumerate(study.causes):
        colour, marker = _look(number)
        every = max(len(each.grid) // 6, 1)
        for axes, quantiles in zip(panels, (each.start, each.teaching), strict=True):
            if quantiles is None:
                continue
            axes.fill_between(each.grid, quantiles[0], quantiles[2], color=colour, alpha=0.15, linewidth=0)
            look = {"color": colour, "marker": marker, "markevery": every, "markersize": 5, "linewidth": 1.5}
            axes.plot(each.grid, quantiles[1], label=short(each.student), **look)
    panels[1].axhline(0.0, color=GREY, linewidth=1.0, linestyle=":")
    panels[1].set_xscale("log")
    _sizes(panels[1].xaxis, [size for each in study.causes for size in each.grid[[0, -1]]])
    panels[1].set_xlabel(f"teacher parameters ({study.count})")
    _legend(panels[1], f"student, {_percent()} band")
    _save(figure, path)


def compute(study: Analysis, path: Path) -> None:
    """Loss against the compute of the run: one colour per student, larger marks for larger teachers; the frontier."""
    figure, axes = _figure()
    cells, runs = study.process.cells, []
    students = cells.students()
    for record, student, teacher in zip(study.records, cells.student, cells.teacher, strict=True):
        colour, marker = _look(students.index(student))
        area = 12 + 90 * (teacher / cells.teacher.max()) ** 0.5
        flops = cost.spent(record)
        axes.scatter(flops, record.valid_loss, s=area, marker=marker, color=colour, alpha=0.75, edgecolors="white")
        runs.append((flops, record.valid_loss))
    frontier = np.array(pareto(runs))
    axes.step(*frontier.T, where="post", color="black", linewidth=1.2, zorder=1.5, label="Pareto frontier")
    for number, student in enumerate(students):
        colour, marker = _look(number)
        axes.plot([], [], marker, color=colour, label=f"student {short(student)}")
    axes.set_xscale("log")
    axes.set_xlabel("compute of the distillation, FLOPs (mark grows with the teacher)")
    axes.set_ylabel("student's validation loss, nats a token")
    _legend(axes, None)
    _save(figure, path)


def price(advice: Advice, path: Path) -> None:
    """Loss with interval against the FLOPs of distilling, for each teacher of the catalogue; also the loss on labels
    alone for the same FLOPs, if known."""
    figure, axes = _figure()
    priced = sorted(((each.flops, each) for each in advice.candidates if each.flops), key=lambda pair: pair[0])
    best = advice.candidates[0].name
    for flops, each in priced:
        low, middle, high = each.losses
        colour, marker, size = (COLOURS[1], "*", 13) if each.name == best else (COLOURS[0], "o", 6)
        axes.errorbar(
            flops,
            middle,
            _bars(middle, (low, high)),
            fmt=marker,
            color=colour,
            markersize=size,
            capsize=4,
            linewidth=1.4,
        )
    if any(each.against for _, each in priced):
        known = [(flops, each.losses[1] + each.against.gain[1]) for flops, each in priced if each.against]
        axes.plot(*zip(*known, strict=True), "--", marker="x", color="black", linewidth=1.2, label="labels alone")
    cheapest = pareto([(flops, each.losses[1]) for flops, each in priced])
    frontier = [each for flops, each in priced if (flops, each.losses[1]) in cheapest or each.name == best]
    above = 0
    for number, (flops, each) in enumerate(priced):
        if each in frontier or len(priced) <= NAMED:
            above = number % 2
            offset = (0, 8 if above else -8)
            side = "bottom" if above else "top"
            end = each.losses[2] if above else each.losses[0]
            axes.annotate(
                each.name, (flops, end), xytext=offset, fontsize=8, textcoords="offset points", ha="center", va=side
            )
    axes.errorbar([], [], [], fmt="*", color=COLOURS[1], markersize=10, label="least expected regret")
    axes.errorbar([], [], [], fmt="o", color=COLOURS[0], markersize=6, capsize=4, label="other teachers")
    axes.set_xscale("log")
    axes.margins(0.12, 0.2)
    axes.set_xlabel("price: FLOPs of student and teacher in distilling")
    axes.set_ylabel(f"student's validation loss, nats a token, {_percent()} interval")
    _legend(axes, f"student of {short(advice.student)}")
    _save(figure, path)


def pareto(runs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (compute, loss) pairs on the Pareto frontier, compute ascending."""
    kept: list[tuple[float, float]] = []
    for flops, loss in sorted(runs):
        if not kept or loss < kept[-1][1]:
            kept.append((flops, loss))
    return kept


def _figure() -> tuple[Figure, Axes]:
    # Without pyplot: needs no display and keeps no global state.
    figure = Figure(figsize=(6.4, 4.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    """Light grid lines in the background, no frame."""
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    # Without matplotlib's version in the metadata, equal pictures are equal files.
    figure.savefig(path, metadata={"Software": None})


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _bars(middle: float, interval: tuple[float, float]) -> list[list[float]]:
    """Lengths of an error bar below and above."""
    return [[max(middle - interval[0], 0.0)], [max(interval[1] - middle, 0.0)]]


def _percent() -> str:
    return f"{100 * LEVEL:.0f}%"


def _sizes(axis: Axis, sizes: Sequence[float]) -> None:
    """Ticks at round sizes, in number according to the range, in short notation."""
    narrow = max(sizes) / min(sizes) < 30
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda size, _: short(size)))
    axis.set_minor_formatter(NullFormatter())


def _ratios(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, title: str | None) -> None:
    axes.legend(title=title, fontsize=8, title_fontsize=8, frameon=False)
