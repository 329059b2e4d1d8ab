"""A student's curve over teachers: the best teacher on the grid, and the vertex of a fitted parabola.

x is the natural logarithm of the teacher's parameters, y the validation loss. Arrays are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from megatron_capgap.law.cells import SAME_SIZE, Array
from megatron_capgap.law.files import LawError
from megatron_capgap.law.records import Record

DRAWS = 2000
LEVEL = 0.9
"""Nominal coverage of intervals."""
WINDOW = 5
"""Maximum number of teachers around the best one to which the parabola is fitted: farther away, curves are not
parabolic."""
UNFIT = 0.25
"""The farthest teacher is left out if the p-value of the deviation from a parabola is below this. The threshold is high
because asymmetry shifts the vertex long before it is significant: on Apple's law, 0.05 estimates it 12% too high."""

OPTIMUM, EDGE, NO_CURSE, TOO_FEW = "optimum", "edge", "no curse seen", "too few teachers"


@dataclass(frozen=True)
class Curve:
    """Losses of one student, for every seed with every teacher."""

    student: float
    """Parameters; the geometric mean if sizes differ slightly."""
    teachers: Array
    """Parameters `[t]`, ascending."""
    seeds: tuple[int, ...]
    losses: Array
    """`[seeds, t]`."""

    @property
    def mean(self) -> Array:
        """Mean loss over the seeds `[t]`."""
        return self.losses.mean(axis=0)


@dataclass(frozen=True)
class Optimum:
    """The best teacher of a curve."""

    best: float
    """Parameters of the teacher with the lowest mean loss."""
    status: str
    """optimum: a minimum inside the grid; edge: the smallest teacher is the best; no curse seen: the loss does not rise
    significantly towards the largest teacher; too few teachers: fewer than three."""
    censored: str | None
    """below or above: the best teacher is outside the grid, on that side."""
    teacher: float | None = None
    """Parameters at the parabola's vertex, only if status is optimum."""
    interval: tuple[float, float] | None = None
    """The vertex's interval, limited to the grid; None without residual degrees of freedom."""
    variance: float = 0.0
    """Variance of the vertex in x, from this curve's own noise."""
    noise: float = 0.0
    """Variance of one run's loss about the parabola; 0 without residual degrees of freedom."""
    freedom: int = 0
    """Residual degrees of freedom of `noise`."""
    curvature: float | None = None
    """Increase of the loss at a distance of 1 in x from the vertex."""
    rise: float | None = None
    """Mean loss with the largest teacher above that with the best; None for too few teachers."""
    chance: float | None = None
    """The rise that seeds alone exceed in at most 1 - LEVEL of all curves; None with one seed."""


def curves(records: Sequence[Record], count: str) -> tuple[list[Curve], list[str]]:
    """Groups records into curves, students ascending.

    Args:
        records: under one set of conditions.
        count: one of `records.COUNTS`.

    Returns:
        (curves, remarks): a remark for every student whose sizes were merged or whose seeds were left out.

    Raises:
        LawError: no seed of a student was run with all of its teachers.
    """
    found, remarks = [], []
    for group in _students(records, count):
        sizes = sorted({record.sizes(count)[0] for record in group})
        student = float(np.exp(np.mean(np.log([record.sizes(count)[0] for record in group]))))
        if len(sizes) > 1:
            remarks.append(f"students of {sizes[0]:,} to {sizes[-1]:,} parameters count as one of {student:,.0f}")
        table: dict[int, dict[int, float]] = {}
        for record in group:
            cell = table.setdefault(record.seed, {})
            if record.sizes(count)[1] in cell:
                raise LawError(
                    f"student of {student:,.0f}, teacher of {record.sizes(count)[1]:,}, seed {record.seed}: there are "
                    "two runs whose other sizes differ; keep one of them"
                )
            cell[record.sizes(count)[1]] = record.valid_loss
        teachers = sorted({teacher for cell in table.values() for teacher in cell})
        seeds = tuple(sorted(seed for seed, cell in table.items() if len(cell) == len(teachers)))
        if not seeds:
            raise LawError(
                f"student of {student:,.0f} parameters: no seed was run with all of its {len(teachers)} teachers; run "
                "the missing cells, or leave those teachers out of the records"
            )
        if left := sorted(set(table) - set(seeds)):
            remarks.append(
                f"student of {student:,.0f}: seeds {', '.join(map(str, left))} lack some of its {len(teachers)} "
                "teachers and are left out"
            )
        losses = np.array([[table[seed][teacher] for teacher in teachers] for seed in seeds])
        found.append(Curve(student, np.array(teachers, dtype=np.float64), seeds, losses))
    return found, remarks


def optimum(curve: Curve, random: np.random.Generator) -> Optimum:
    """The best teacher of a student, with its uncertainty from the seeds.

    A curve that falls steeply at first and then stays flat also has a vertex inside the grid, so the rise beyond the
    optimum must be significant. The parabola is fitted with one level per seed, because a seed's data order and initial
    weights shift its whole curve. The interval is a bootstrap of the residuals, which also draws the noise variance.
    """
    x, mean = np.log(curve.teachers), curve.mean
    at = int(mean.argmin())
    best = float(curve.teachers[at])
    ends = {0: "below", len(x) - 1: "above"}
    if len(x) < 3:
        return Optimum(best, TOO_FEW, None)
    rise: dict[str, Any] = {"rise": float(mean[-1] - mean[at]), "chance": chance_rise(curve)}
    if ends.get(at) == "above":
        return Optimum(best, NO_CURSE, "above", **rise)
    if rise["chance"] is not None and rise["rise"] <= rise["chance"]:
        return Optimum(best, NO_CURSE, None, **rise)
    if at in ends:
        return Optimum(best, EDGE, ends[at], **rise)
    fitted = _parabola(curve, at)
    vertex = float(_vertex(fitted.coefficients[None], x - fitted.centre)[0])
    if fitted.coefficients[2] <= 0 or not x[0] - fitted.centre < vertex < x[-1] - fitted.centre:
        return Optimum(best, NO_CURSE, None, **rise)
    found = rise | {"teacher": float(np.exp(vertex + fitted.centre)), "curvature": float(fitted.coefficients[2])}
    if fitted.freedom <= 0:
        return Optimum(best, OPTIMUM, None, **found)
    vertices = _vertex(fitted.draws(random), x - fitted.centre)
    if np.mean(vertices < x[-1] - fitted.centre) < LEVEL:
        return Optimum(best, NO_CURSE, None, **rise)
    low, high = np.exp(np.quantile(vertices, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + fitted.centre)
    # From the interquartile range, because a few draws at the ends of the grid would dominate a variance.
    spread = np.subtract(*np.quantile(vertices, [0.75, 0.25])) / 1.349
    found |= {"variance": float(spread**2), "noise": fitted.noise, "freedom": fitted.freedom}
    return Optimum(best, OPTIMUM, None, interval=(float(low), float(high)), **found)


def chance_rise(curve: Curve) -> float | None:
    """The rise from the best teacher to the largest that seeds alone exceed in at most 1 - LEVEL of all curves, if all
    teachers are equally good; None with one seed.

    A one-sided t test between two teachers' means over seeds, with the noise of all runs about the levels of their seed
    and teacher. The best teacher was chosen among all but the largest, so the level is divided by their number
    (Bonferroni).
    """
    seeds, teachers = curve.losses.shape
    freedom = (seeds - 1) * (teachers - 1)
    if not freedom:
        return None
    levelled = curve.losses - curve.losses.mean(axis=1, keepdims=True)
    noise = float(np.sum((levelled - levelled.mean(axis=0)) ** 2)) / freedom
    return float(stats.t.isf((1 - LEVEL) / (teachers - 1), freedom)) * (2 * noise / seeds) ** 0.5


@dataclass(frozen=True)
class _Parabola:
    """A parabola fitted to the teachers around the best one, with one level per seed."""

    centre: float
    """Origin of x."""
    solve: Array
    """From mean losses to coefficients `[3, w]`."""
    coefficients: Array
    """Level, slope, curvature."""
    residuals: Array
    """`[seeds, w]`."""
    lack_of_fit: float
    """p-value of the deviation from a parabola, given the noise of the seeds; 1 if they cannot estimate it."""

    @property
    def freedom(self) -> int:
        """Residual degrees of freedom, after one level per seed, a slope and a curvature."""
        return self.residuals.size - len(self.residuals) - 2

    @property
    def noise(self) -> float:
        """Variance of one run's loss."""
        return float(np.sum(self.residuals**2)) / self.freedom

    def draws(self, random: np.random.Generator) -> Array:
        """Bootstrap draws of the coefficients `[DRAWS, 3]`."""
        drawn = self.residuals.ravel()[random.integers(self.residuals.size, size=(DRAWS, *self.residuals.shape))]
        size = np.sqrt(self.residuals.size / random.chisquare(self.freedom, DRAWS))
        return self.coefficients + (drawn.mean(axis=1) * size[:, None]) @ self.solve.T


def _parabola(curve: Curve, at: int) -> _Parabola:
    """Fits the largest window around teacher number `at`, up to WINDOW, in which the curve is parabolic."""
    x = np.log(curve.teachers)
    nearest = [n for n in np.argsort(np.abs(x - x[at]), kind="stable").tolist() if abs(n - at) > 1]
    window = [at - 1, at, at + 1, *nearest][:WINDOW]
    while True:
        fitted = _fit(curve, sorted(window))
        if len(window) == 3 or fitted.lack_of_fit > UNFIT:
            return fitted
        window.pop()


def _fit(curve: Curve, window: list[int]) -> _Parabola:
    x, losses = np.log(curve.teachers[window]), curve.losses[:, window]
    centre = float(x.mean())
    design = np.stack([np.ones(len(x)), x - centre, (x - centre) ** 2], axis=1)
    solve = np.asarray(np.linalg.pinv(design), dtype=np.float64)  # what it is: older stubs say less
    losses = losses - losses.mean(axis=1, keepdims=True)
    mean = losses.mean(axis=0)
    coefficients = solve @ mean
    misses = len(losses) * np.sum((mean - design @ coefficients) ** 2)
    noise, freedom, noise_freedom = np.sum((losses - mean) ** 2), len(x) - 3, (len(losses) - 1) * (len(x) - 1)
    lack = 1.0
    if freedom and noise_freedom:
        # Without noise, rounding errors must not count as asymmetry.
        ratio = (misses / freedom) / max(noise / noise_freedom, 1e-20)
        lack = float(stats.f.sf(ratio, freedom, noise_freedom))
    return _Parabola(centre, solve, coefficients, losses - design @ coefficients, lack)


def _vertex(coefficients: Array, x: Array) -> Array:
    """The minimum of each parabola `[n, 3]` within the range of x: `[n]`."""
    level, slope, bend = coefficients.T
    at_ends = np.stack([level + slope * end + bend * end**2 for end in (x[0], x[-1])])
    end = np.where(at_ends[0] <= at_ends[1], x[0], x[-1])
    bent = bend > 0
    return np.where(bent, np.clip(-slope / (2 * np.where(bent, bend, 1.0)), x[0], x[-1]), end)


def _students(records: Sequence[Record], count: str) -> list[list[Record]]:
    """Records by student, ascending; sizes that differ slightly count as one student."""
    ordered = sorted(records, key=lambda record: record.sizes(count))
    groups: list[list[Record]] = []
    for record in ordered:
        size = record.sizes(count)[0]
        if groups and size <= groups[-1][0].sizes(count)[0] * (1 + SAME_SIZE):
            groups[-1].append(record)
        else:
            groups.append([record])
    return groups
