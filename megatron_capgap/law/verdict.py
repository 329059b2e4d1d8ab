"""What the posterior says about each student of the data, and whether there is a law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_capgap.law.cells import Array
from megatron_capgap.law.gaussian_process import Process

LEVEL = 0.9
"""Share of the posterior that an interval holds."""
MATTERS = 0.002
"""Nats a token. A smaller rise or fall counts as none: another seed changes as much."""
SURE, SURE_ONE_WAY = 0.9, 0.95
"""Probability from which on an interior optimum is told, and a curve that only falls or only rises. The prior holds
that all teachers are alike to be next to impossible: where they are, the luck of few trainings lies along a rise or
a fall, and each of the two would pass 0.9 in up to a tenth of all grids. An interior optimum needs both."""
STUDENTS = 3
"""The word law needs interior optima of so many students."""
POINTS = 41
DRAWS = 2000

INTERIOR, SMALLEST, SATURATING, FLAT = "interior", "smallest", "saturating", "flat"
NOT_DETECTED = "not detected"


@dataclass(frozen=True)
class Finding:
    """One student."""

    student: float
    """Parameters."""
    verdict: str
    """interior: the loss falls by MATTERS or more towards larger teachers and rises by as much again; smallest: it only
    rises; saturating: it falls and does not rise again; not detected: none of these is as probable as SURE
    or SURE_ONE_WAY asks."""
    probability: float
    """Of the verdict; for `not detected`, that of an interior optimum."""
    probabilities: dict[str, float]
    """Of interior, smallest, saturating and flat; all 0 where there is one teacher, which shows no curve."""
    best: float
    """Median of the best teacher, parameters, within the grid."""
    interval: tuple[float, float]
    """LEVEL interval of the best teacher."""
    grid: Array
    """Teachers, parameters `[m]`, from the smallest to the largest that the student was trained with."""
    measured: float
    """The teacher with the lowest mean loss as measured, its luck included, parameters."""
    curve: Array
    """Quantiles of the loss at `grid`, nats a token `[3, m]`: the lower end of the interval, median, upper end."""
    optimum: Array
    """Probability of each teacher of `grid` to be the best `[m]`."""


def findings(process: Process) -> list[Finding]:
    """A verdict for every student of the data, ascending."""
    return [finding(process, student) for student in process.cells.students()]


def finding(process: Process, student: float) -> Finding:
    """The verdict on one student of the data."""
    ratios = span(process, student)
    assert ratios is not None, "a student of the data has teachers"
    drawn = process.curves(student, ratios, DRAWS)
    lowest, at = drawn.min(axis=1), drawn.argmin(axis=1)
    falls, rises = drawn[:, 0] - lowest > MATTERS, drawn[:, -1] - lowest > MATTERS
    several = float(ratios[-1] > ratios[0])  # one teacher shows no curve
    shares = {
        INTERIOR: float(np.mean(falls & rises)),
        SMALLEST: float(np.mean(~falls & rises)),
        SATURATING: float(np.mean(falls & ~rises)),
        FLAT: several * float(np.mean(~falls & ~rises)),
    }
    likely = max((INTERIOR, SMALLEST, SATURATING), key=shares.__getitem__)
    verdict = likely if shares[likely] >= (SURE if likely == INTERIOR else SURE_ONE_WAY) else NOT_DETECTED
    grid = student * np.exp(ratios)
    low, middle, high = (student * np.exp(quantiles(minima(ratios, drawn)))).tolist()
    return Finding(
        student=student,
        verdict=verdict,
        probability=shares[INTERIOR if verdict == NOT_DETECTED else verdict],
        probabilities=shares,
        best=middle,
        interval=(low, high),
        grid=grid,
        measured=_measured(process, student),
        curve=quantiles(levelled(process, student, ratios, drawn)),
        optimum=np.bincount(at, minlength=POINTS) / DRAWS,
    )


def _measured(process: Process, student: float) -> float:
    mine = process.cells.chosen(process.cells.student == student)
    sizes = np.unique(mine.teacher)
    return float(sizes[np.argmin([mine.loss[mine.teacher == size].mean() for size in sizes])])


def levelled(process: Process, student: float, ratios: Array, drawn: Array) -> Array:
    """Draws of a curve at the level of the student's runs under teachers of ordinary luck `[draws, m]`."""
    mine = process.cells.student == student
    level = np.mean(process.cells.loss[mine] - process.teachers()[process.cells.training[mine]])
    at_runs = [np.interp(process.d[mine], ratios, each).mean() for each in drawn]
    return drawn - np.array(at_runs)[:, None] + level


def is_law(found: Sequence[Finding]) -> bool:
    """Whether enough students surely have an interior optimum."""
    return sum(each.verdict == INTERIOR for each in found) >= STUDENTS


def minima(ratios: Array, drawn: Array) -> Array:
    """Where each curve `[draws, m]` over equally spaced `ratios` is lowest `[draws]`: the vertex of the parabola
    through its lowest point and the neighbours."""
    at = drawn.argmin(axis=1)
    inner = np.clip(at, 1, len(ratios) - 2)
    rows = np.arange(len(drawn))
    left, middle, right = (drawn[rows, inner + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    found = ratios[inner] + np.clip(shift, -1.0, 1.0) * (ratios[1] - ratios[0])
    return np.where(at == inner, found, ratios[at])


def span(process: Process, student: float) -> Array | None:
    """log(T / S) between which something is known of a student `[POINTS]`; None where that is nowhere.

    For a student of the data, what its own teachers span; for another, the ratios that were tried, without teachers
    smaller or larger than any of the data.
    """
    mine = process.cells.student == student
    if mine.any():
        return np.linspace(process.d[mine].min(), process.d[mine].max(), POINTS)
    sizes = np.log(process.cells.teacher / student)
    low, high = max(process.d.min(), sizes.min()), min(process.d.max(), sizes.max())
    return np.linspace(low, high, POINTS) if low < high else None


def quantiles(drawn: Array) -> Array:
    """The ends of the LEVEL interval and the median between them, over the first axis `[3, ...]`."""
    ends = [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]
    return np.quantile(drawn, ends, axis=0)
