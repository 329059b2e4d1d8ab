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
    for number, (curve, found) in enumerate(study.optima):
        if found.teacher is not None:  # after all curves, when the range of losses is known
            _mark(axes, curve, found, _look(number)[0])
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
    _explain_points(axes, study)
    for curve, found in study.optima:
        _point(axes, curve, found)
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
    axes.step(*frontier.T, where="post", color="black", linewidth=1.2, zorder=1.5, label="Pareto frontier")
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
    """The optimum: a star below its curve, and a bar over its interval."""
    assert found.teacher is not None
    lowest, highest = axes.get_ylim()
    loss = float(np.interp(np.log(found.teacher), np.log(curve.teachers), curve.mean)) - 0.035 * (highest - lowest)
    look = {"color": colour, "markersize": 11, "markeredgecolor": "black", "markeredgewidth": 0.6}
    bars = _bars(found.teacher, found.interval)
    axes.errorbar(found.teacher, loss, xerr=bars, fmt="*", ecolor="black", elinewidth=1.2, capsize=3, zorder=5, **look)


def _bars(middle: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    """Lengths of an error bar below and above; a parabola's interval need not lie around its vertex."""
    if interval is None:
        return None
    return [[max(middle - interval[0], 0.0)], [max(interval[1] - middle, 0.0)]]


def _point(axes: Axes, curve: Curve, found: Optimum) -> None:
    """A student in the picture of the law: what its grid says, what its parabola says, or where its optimum hides."""
    axes.plot(curve.student, found.best, "o", markerfacecolor="none", markeredgecolor=COLOURS[1], markersize=9)
    if found.teacher is not None:
        bars = _bars(found.teacher, found.interval)
        axes.errorbar(
            curve.student, found.teacher, bars, fmt="o", color="black", markersize=5, capsize=3, linewidth=1.2
        )
    elif found.censored is not None:
        place = (0, 30 if found.censored == "above" else -30)
        arrow = {"arrowstyle": "<-", "color": COLOURS[1], "linewidth": 1.6}
        axes.annotate("", (curve.student, found.best), place, textcoords="offset points", arrowprops=arrow)


def _explain_points(axes: Axes, study: Study) -> None:
    """The legend's rows for what `_point` draws."""
    if any(found.teacher is not None for _, found in study.optima):
        axes.plot([], [], "ko", markersize=5, label=f"optimum, {_percent()} interval")
    axes.plot([], [], "o", markerfacecolor="none", markeredgecolor=COLOURS[1], markersize=9, label="best on the grid")
    beyond = {found.censored for _, found in study.optima} - {None}
    if beyond:
        arrow = r"$\updownarrow$" if len(beyond) > 1 else r"$\uparrow$" if "above" in beyond else r"$\downarrow$"
        axes.plot([], [], color=COLOURS[1], marker=arrow, linestyle="", markersize=11, label="optimum beyond it")


def _paper(axes: Axes, reach: Array) -> None:
    """The paper's line where it is positive; else its slope alone."""
    k, b = fit.PAPER
    if k * reach[0] + b > reach[0]:
        axes.plot(reach, k * reach + b, "--", color=COLOURS[1], linewidth=1.4, label="paper: 2.498 S - 11.5M")
    else:
        # Below some 8M parameters the paper's line would ask for a teacher smaller than the student.
        axes.plot(reach, k * reach, "--", color=COLOURS[1], linewidth=1.4, label="paper's slope: 2.498 S")


def _foretold(axes: Axes, prediction: Prediction) -> None:
    bars = _bars(prediction.teacher, prediction.interval)
    look = {"fmt": "*", "color": COLOURS[2], "markersize": 10, "markeredgecolor": "black", "markeredgewidth": 0.6}
    axes.errorbar(prediction.student, prediction.teacher, bars, ecolor=COLOURS[2], capsize=4, label="foretold", **look)


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
