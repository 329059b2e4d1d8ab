"""Three pictures: the curse, the law, compute against loss. Colours of Okabe and Ito, told apart by markers as well."""

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
from megatron_capgap.law.curves import LEVEL, Array, Curve, Optimum
from megatron_capgap.law.study import Prediction, Study
from megatron_capgap.law.words import formula, short

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
DPI = 200


def curse(study: Study, path: Path) -> None:
    """Validation loss against teacher size: a curve a student, a dot a seed, the optimum with its interval."""
    figure, axes = _figure()
    for number, (curve, found) in enumerate(study.optima):
        colour, marker = _look(number)
        for losses in curve.losses:
            axes.plot(curve.teachers, losses, marker, color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
        label = f"{short(curve.student)}: {_verdict(found)}"
        axes.plot(curve.teachers, curve.mean, marker=marker, color=colour, markersize=6, linewidth=1.5, label=label)
        if found.teacher is not None:
            _mark(axes, curve, found, colour)
    axes.set_xscale("log")
    _sizes(axes.xaxis, [size for curve, _ in study.optima for size in curve.teachers])
    axes.set_xlabel(f"teacher parameters ({study.count})")
    axes.set_ylabel("student's validation loss, nats a token")
    _legend(axes, f"student: best teacher, {_percent()} interval")
    _save(figure, path)


def law(study: Study, path: Path, prediction: Prediction | None = None) -> None:
    """Best teacher against student: optima with intervals, the law with its band, the paper's line, T = S."""
    figure, axes = _figure()
    students = np.array([curve.student for curve, _ in study.optima])
    wanted = [prediction.student] if prediction else []
    reach = np.geomspace(min(*students, *wanted, students[0]) / 1.4, max(*students, *wanted, students[-1]) * 1.4, 100)
    if study.chosen is not None:
        band = study.chosen.band(reach)
        if band is not None:
            axes.fill_between(reach, *band, color=COLOURS[0], alpha=0.18, linewidth=0, label=f"{_percent()} band")
        axes.plot(
            reach, study.chosen.teacher(reach), color=COLOURS[0], linewidth=1.8, label=f"law: {formula(study.chosen)}"
        )
    _paper(axes, reach)
    axes.plot(reach, reach, ":", color=GREY, linewidth=1.2, label="T = S")
    for number, (curve, found) in enumerate(study.optima):
        _point(axes, curve, found, first=number == 0)
    if prediction is not None:
        _foretold(axes, prediction)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _sizes(axes.xaxis, [*students, *wanted])
    _sizes(axes.yaxis, [size for curve, _ in study.optima for size in curve.teachers])
    axes.set_xlabel(f"student parameters ({study.count})")
    axes.set_ylabel("best teacher's parameters")
    _legend(axes, None)
    _save(figure, path)


def compute(study: Study, path: Path) -> None:
    """Loss against the compute of the run: a colour a student, larger marks for larger teachers, the frontier."""
    figure, axes = _figure()
    where = {(curve.student, teacher): n for n, (curve, _) in enumerate(study.optima) for teacher in curve.teachers}
    largest = max(teacher for _, teacher in where)
    runs = []
    for record in study.records:
        student, teacher = record.sizes(study.count)
        number = min(where.items(), key=lambda item: abs(np.log(item[0][0] / student)))[1]
        colour, marker = _look(number)
        area = 12 + 90 * (teacher / largest) ** 0.5
        flops = cost.spent(record)
        axes.scatter(flops, record.valid_loss, s=area, marker=marker, color=colour, alpha=0.75, edgecolors="white")
        runs.append((flops, record.valid_loss))
    frontier = np.array(pareto(runs))
    axes.step(*frontier.T, where="post", color="black", linewidth=1.2, label="Pareto frontier")
    for number, (curve, _) in enumerate(study.optima):
        colour, marker = _look(number)
        axes.plot([], [], marker, color=colour, label=f"student {short(curve.student)}")
    axes.set_xscale("log")
    axes.set_xlabel("compute of the distillation, FLOPs (mark grows with the teacher)")
    axes.set_ylabel("student's validation loss, nats a token")
    _legend(axes, None)
    _save(figure, path)


def pareto(runs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (compute, loss) pairs that no other run beats in both, compute ascending."""
    kept: list[tuple[float, float]] = []
    for flops, loss in sorted(runs):
        if not kept or loss < kept[-1][1]:
            kept.append((flops, loss))
    return kept


def _figure() -> tuple[Figure, Axes]:
    # Without pyplot: no display is looked for and no state is left behind.
    figure = Figure(figsize=(6.4, 4.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib in it, equal pictures are equal files.
    figure.savefig(path, metadata={"Software": None})


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _verdict(found: Optimum) -> str:
    if found.teacher is None:
        return f"{short(found.best)}, {found.status}"
    if found.interval is None:
        return short(found.teacher)
    return f"{short(found.teacher)} ({short(found.interval[0])} to {short(found.interval[1])})"


def _mark(axes: Axes, curve: Curve, found: Optimum, colour: str) -> None:
    """The optimum below its curve: a star, and a bar over its interval."""
    loss = float(np.interp(np.log(found.teacher), np.log(curve.teachers), curve.mean))
    if found.interval is not None:
        axes.plot(found.interval, [loss, loss], "|-", color=colour, linewidth=3, alpha=0.45, markersize=9)
    axes.plot(found.teacher, loss, "*", color=colour, markersize=13, markeredgecolor="white", zorder=5)


def _point(axes: Axes, curve: Curve, found: Optimum, first: bool) -> None:
    axes.plot(
        curve.student,
        found.best,
        "o",
        markerfacecolor="none",
        markeredgecolor=COLOURS[1],
        markersize=9,
        label="best on the grid" if first else None,
    )
    if found.teacher is not None:
        bars = None
        if found.interval is not None:
            bars = [[found.teacher - found.interval[0]], [found.interval[1] - found.teacher]]
        axes.errorbar(
            curve.student, found.teacher, bars, fmt="o", color="black", markersize=5, capsize=3, linewidth=1.2
        )
    elif found.censored is not None:
        up = found.censored == "above"
        tip = (0, 26 if up else -26)
        arrow = {"arrowstyle": "->", "color": COLOURS[1], "linewidth": 1.4}
        axes.annotate("", tip, (curve.student, found.best), textcoords="offset points", arrowprops=arrow)


def _paper(axes: Axes, reach: Array) -> None:
    """The paper's line where it is positive; else its slope alone."""
    k, b = fit.PAPER
    if k * reach[0] + b > reach[0]:
        axes.plot(reach, k * reach + b, "--", color=COLOURS[1], linewidth=1.4, label="paper: 2.498 S - 11.5M")
    else:
        # Below some 8M parameters the paper's line would ask for a teacher smaller than the student.
        axes.plot(reach, k * reach, "--", color=COLOURS[1], linewidth=1.4, label="paper's slope: 2.498 S")


def _foretold(axes: Axes, prediction: Prediction) -> None:
    bars = None
    if prediction.interval is not None:
        low, high = prediction.interval
        bars = [[max(prediction.teacher - low, 0.0)], [max(high - prediction.teacher, 0.0)]]
    look = {"fmt": "*", "color": COLOURS[2], "markersize": 12, "capsize": 4}
    axes.errorbar(prediction.student, prediction.teacher, bars, label="foretold", **look)


def _percent() -> str:
    return f"{100 * LEVEL:.0f}%"


def _sizes(axis: Axis, sizes: Sequence[float]) -> None:
    """Ticks at round sizes, as many as the range needs, written short."""
    narrow = max(sizes) / min(sizes) < 30
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda size, _: short(size)))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, title: str | None) -> None:
    axes.legend(title=title, fontsize=8, title_fontsize=8, frameon=False)
