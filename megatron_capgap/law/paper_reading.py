"""The paper's method on a set of records: a parabola per student, and a line through the vertices.

It mistakes the random effect of each teacher's training for an effect of the teacher's size, and its optima follow the
grid. It is reported for comparison only: the verdicts and advice in `law.json` come from `verdict` and `advice`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_capgap.law import curves, fit
from megatron_capgap.law.curves import Curve, Optimum
from megatron_capgap.law.files import LawError
from megatron_capgap.law.fit import Law
from megatron_capgap.law.records import Record

FEW_STUDENTS = 3


@dataclass(frozen=True)
class PaperFit:
    """Result of the paper's method on a set of records."""

    optima: Sequence[tuple[Curve, Optimum]]
    laws: Mapping[str, Law]
    chosen: Law | None
    """The form chosen for prediction; None if no student has an optimum."""
    remarks: Sequence[str]
    """Caveats; if the records have gaps, the reason why there is no result."""


def read(records: Sequence[Record], count: str) -> PaperFit:
    """Finds each student's optimum and fits a law through them.

    Args:
        records: under one set of conditions, from `records.select`.
        count: how parameters are counted, one of `records.COUNTS`.
    """
    random = np.random.default_rng(0)
    try:
        found, remarks = curves.curves(records, count)
    except LawError as reason:  # this method needs exactly one run in every cell
        return PaperFit([], {}, None, [str(reason)])
    optima = [(curve, curves.optimum(curve, random)) for curve in found]
    fitted = fit.laws(optima, random)
    chosen = fit.choose(fitted)
    return PaperFit(optima, fitted, chosen, [*remarks, *_caveats(optima, chosen)])


def as_dict(reading: PaperFit) -> dict[str, Any]:
    """The result as stored in law.json."""
    return {
        "students": [_student(curve, found) for curve, found in reading.optima],
        "laws": {name: _law(law) for name, law in reading.laws.items()},
        "chosen": reading.chosen.form.name if reading.chosen else None,
        "through_best_on_grid": fit.paper_reading(reading.optima),
        "paper": {"k": fit.PAPER[0], "b": fit.PAPER[1]},
        "remarks": list(reading.remarks),
    }


def _student(curve: Curve, found: Optimum) -> dict[str, Any]:
    return {
        "student_params": curve.student,
        "seeds": curve.seeds,
        "teachers": curve.teachers.tolist(),
        "mean_loss": curve.mean.tolist(),
        "best_teacher": found.best,
        "status": found.status,
        "censored": found.censored,
        "optimum": found.teacher,
        "optimum_interval": found.interval,
        "curvature": found.curvature,
        "rise": found.rise,
        "rise_by_chance": found.chance,
    }


def _law(law: Law) -> dict[str, Any]:
    return {
        **law.values(),
        "intervals": law.intervals(),
        "students": len(law.students),
        "r2": law.r2,
        "leave_one_out_error": law.leave_one_out,
        "small_to_large_error": law.holdout,
    }


def _caveats(optima: Sequence[tuple[Curve, Optimum]], chosen: Law | None) -> list[str]:
    """Caveats about the optima and the law."""
    found = []
    for curve, best in optima:
        name, largest = f"student of {curve.student:,.0f}", f"{curve.teachers[-1]:,.0f}"
        if best.status == curves.TOO_FEW:
            found.append(f"{name}: {len(curve.teachers)} teacher(s); a curve needs at least 3")
        elif best.status == curves.EDGE:
            found.append(
                f"{name}: the smallest teacher, of {best.best:,.0f}, is the best, so its optimum is censored: it lies "
                "there or below; smaller teachers would tell"
            )
        elif best.status == curves.NO_CURSE and best.censored:
            found.append(
                f"{name}: no curse seen; the largest teacher, of {largest}, is the best, so its optimum, if it has "
                "one, is censored: it lies there or above"
            )
        elif (
            best.status == curves.NO_CURSE
            and best.chance is not None
            and best.rise is not None
            and best.rise <= best.chance
        ):
            found.append(
                f"{name}: no curse seen; its loss with the largest teacher is {best.rise:.4f} nats above that with the "
                f"best, and seeds alone may bring about {best.chance:.4f}"
            )
        elif best.status == curves.NO_CURSE:
            found.append(
                f"{name}: no curse seen; its losses do not rise towards the largest teacher by more than their noise"
            )
        elif best.chance is None:
            found.append(
                f"{name}: with one seed nothing tells whether its rise towards the largest teacher is more than chance"
            )
        if best.status == curves.OPTIMUM and best.interval is None:
            found.append(f"{name}: three teachers and one seed do not tell how sure its optimum is")
    used = len(chosen.students) if chosen else 0
    if not used:
        found.append("no student has shown an optimum inside the grid, so there is no law to draw")
    elif used < FEW_STUDENTS:
        found.append(
            f"the law stands on {used} student(s); with fewer than {FEW_STUDENTS} it is hardly more than a guess"
        )
    if chosen:
        found += _contradictions(optima, chosen)
    return found


def _contradictions(optima: Sequence[tuple[Curve, Optimum]], law: Law) -> list[str]:
    """Students left out of the fit whose censored optimum contradicts the law."""
    found = []
    for curve, best in optima:
        teacher = float(law.teacher(np.array([curve.student]))[0])
        below = best.censored == "below" and teacher > best.best
        above = best.censored == "above" and teacher < best.best
        if below or above:
            found.append(
                f"student of {curve.student:,.0f}: the law says {teacher:,.0f}, its own runs say {best.best:,.0f} or "
                f"{'less' if below else 'more'}"
            )
    return found
