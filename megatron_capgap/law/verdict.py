"""Verdict on each student of the data from the posterior, and whether there is a law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_capgap.law.cells import Array
from megatron_capgap.law.gaussian_process import Process

LEVEL = 0.9
"""Posterior probability of an interval."""
MATTERS = 0.002
"""Nats per token. A smaller rise or fall does not count: another seed changes as much."""
SURE, SURE_ONE_WAY = 0.9, 0.95
"""Minimum probability to report an interior optimum, and a curve that only falls or only rises. The prior gives almost
no probability to equally good teachers. If they are equal, the random effects of few trainings resemble a rise or a
fall, and each of the two would exceed 0.9 in up to 10 % of all grids. An interior optimum requires both."""
STUDENTS = 3
"""Minimum number of students with an interior optimum to report a law."""
POINTS = 41
DRAWS = 2000

INTERIOR, SMALLEST, SATURATING, FLAT = "interior", "smallest", "saturating", "flat"
NOT_DETECTED = "not detected"


@dataclass(frozen=True)
class Finding:
    """The verdict on one student."""

    student: float
    """Parameters."""
    verdict: str
    """interior: the loss falls by at least MATTERS towards larger teachers and then rises by at least as much;
    smallest: it only rises; saturating: it falls and does not rise again; not detected: none of these reaches the
    probability SURE or SURE_ONE_WAY."""
    probability: float
    """Probability of the verdict; for `not detected`, that of an interior optimum."""
    probabilities: dict[str, float]
    """Probabilities of interior, smallest, saturating and flat; all 0 with a single teacher."""
    best: float
    """Median of the best teacher, parameters, within the grid."""
    interval: tuple[float, float]
    """LEVEL interval of the best teacher."""
    grid: Array
    """Parameters of teachers `[m]`, from the smallest to the largest that the student was trained with."""
    measured: float
    """Parameters of the teacher with the lowest measured mean loss, including the random effect of its training."""
    curve: Array
    """Quantiles of the loss at `grid`, nats per token `[3, m]`: lower end of the interval, median, upper end."""
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
    several = float(ratios[-1] > ratios[0])  # a single teacher gives no curve
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
    """Draws of a curve at the level of the student's runs, under teachers of average training `[draws, m]`."""
    mine = process.cells.student == student
    level = np.mean(process.cells.loss[mine] - process.teachers()[process.cells.training[mine]])
    at_runs = [np.interp(process.d[mine], ratios, each).mean() for each in drawn]
    return drawn - np.array(at_runs)[:, None] + level


def is_law(found: Sequence[Finding]) -> bool:
    """Whether enough students have an interior optimum with probability SURE."""
    return sum(each.verdict == INTERIOR for each in found) >= STUDENTS


def minima(ratios: Array, drawn: Array) -> Array:
    """Minimum of each curve `[draws, m]` over equally spaced `ratios` `[draws]`: the vertex of the parabola through its
    lowest point and the neighbours."""
    at = drawn.argmin(axis=1)
    inner = np.clip(at, 1, len(ratios) - 2)
    rows = np.arange(len(drawn))
    left, middle, right = (drawn[rows, inner + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    found = ratios[inner] + np.clip(shift, -1.0, 1.0) * (ratios[1] - ratios[0])
    return np.where(at == inner, found, ratios[at])


def span(process: Process, student: float) -> Array | None:
    """Range of log(T / S) that the data cover for a student `[POINTS]`; None if there is none.

    For a student of the data, the range of its own teachers; for another student, the tried ratios, limited to teachers
    within the sizes of the data.
    """
    mine = process.cells.student == student
    if mine.any():
        return np.linspace(process.d[mine].min(), process.d[mine].max(), POINTS)
    sizes = np.log(process.cells.teacher / student)
    low, high = max(process.d.min(), sizes.min()), min(process.d.max(), sizes.max())
    return np.linspace(low, high, POINTS) if low < high else None


def quantiles(drawn: Array) -> Array:
    """Lower end of the LEVEL interval, median and upper end, over the first axis `[3, ...]`."""
    ends = [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]
    return np.quantile(drawn, ends, axis=0)
