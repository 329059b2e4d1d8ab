"""From records to the law, and from the law to a teacher: everything that law.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_capgap.law import cost, curves, fit
from megatron_capgap.law.curves import Curve, Optimum, Teacher
from megatron_capgap.law.fit import Law
from megatron_capgap.law.records import Record, conditions

FEW_STUDENTS = 3
FAR = 1.25
"""Sizes beyond the fitted students by more than this factor are far enough to warn of."""
DIGITS = 6
"""Significant digits in law.json: what a bootstrap can vouch for, and the same on every machine."""


@dataclass(frozen=True)
class Study:
    """What a set of records says."""

    records: Sequence[Record]
    count: str
    teachers: Sequence[Teacher]
    optima: Sequence[tuple[Curve, Optimum]]
    laws: Mapping[str, Law]
    chosen: Law | None
    """The law that predicts; None where no student has shown an optimum."""
    remarks: Sequence[str]


@dataclass(frozen=True)
class Candidate:
    """A teacher that can be had."""

    name: str
    teacher: float
    """Parameters."""
    regret: float
    """Loss that it is foretold to cost above the best teacher, nats a token."""
    regret_high: float
    """The upper end of the regret's interval."""


@dataclass(frozen=True)
class Prediction:
    """The teacher for a student."""

    student: float
    teacher: float
    interval: tuple[float, float] | None
    """Where a new student's best teacher lies; None where nothing tells."""
    beyond: float
    """How many times the student is beyond the fitted sizes; 1 within them."""
    candidates: tuple[Candidate, ...]
    """The catalogue's teachers larger than the student, the least regret first."""


def study(records: Sequence[Record], count: str) -> Study:
    """Finds each student's optimum and fits the law.

    Args:
        records: under one set of conditions, from `records.select`.
        count: how parameters are counted, one of `records.COUNTS`.

    Raises:
        LawError: curves that cannot be made from the records.
    """
    random = np.random.default_rng(0)
    teachers = curves.teachers(records, count)
    found, remarks = curves.curves(records, count)
    optima = [(curve, curves.optimum(curve, random)) for curve in found]
    fitted = fit.laws(optima, random)
    chosen = fit.choose(fitted)
    remarks += [*_doubts_of_runs(records, teachers), *_doubts(optima, chosen)]
    return Study(records, count, teachers, optima, fitted, chosen, remarks)


def predict(study: Study, student: float, catalogue: Mapping[str, float]) -> Prediction:
    """The teacher for a student, by the chosen law.

    Args:
        study: has a chosen law.
        student: parameters, counted as the study counts.
        catalogue: parameters of teachers by name, counted likewise.
    """
    law = study.chosen
    assert law is not None
    draws = law.teacher_draws(student, np.random.default_rng(1))
    teacher = float(law.teacher(np.array([student]))[0])
    interval = None
    if draws is not None:
        low, high = np.quantile(draws, [(1 - curves.LEVEL) / 2, (1 + curves.LEVEL) / 2]).tolist()
        interval = (low, high)
    bend = float(np.median([found.curvature for _, found in study.optima if found.curvature is not None]))
    candidates = []
    for name, size in catalogue.items():
        if size > student:
            regret = bend * np.log(size / teacher) ** 2
            drawn = bend * np.log(size / draws) ** 2 if draws is not None else np.array([regret])
            high = float(np.quantile(drawn, (1 + curves.LEVEL) / 2))
            candidates.append(Candidate(name, float(size), float(regret), high))
    beyond = max(student / law.students[-1], law.students[0] / student, 1.0)
    best_first = tuple(sorted(candidates, key=lambda candidate: (candidate.regret, candidate.name)))
    return Prediction(student, teacher, interval, float(beyond), best_first)


def doubts(prediction: Prediction, study: Study) -> list[str]:
    """What to keep in mind about a prediction."""
    found = []
    if prediction.beyond > FAR:
        assert study.chosen is not None
        low, high = study.chosen.students[[0, -1]]
        found.append(
            f"the student of {prediction.student:,.0f} parameters is {prediction.beyond:.3g} times beyond the students "
            f"that the law was fitted on ({low:,.0f} to {high:,.0f}): this is an extrapolation, and the interval does "
            "not know whether the law goes on"
        )
    return found


def as_json(
    study: Study, prediction: Prediction | None = None, saving: cost.Saving | None = None, doubts: Sequence[str] = ()
) -> str:
    """law.json: the same records give the same bytes."""
    content: dict[str, Any] = {
        "format": 1,
        "count": study.count,
        "records": len(study.records),
        "conditions": conditions(study.records),
        "teachers": [asdict(teacher) for teacher in study.teachers],
        "interval_level": curves.LEVEL,
        "students": [_student(curve, found) for curve, found in study.optima],
        "laws": {name: _law(law) for name, law in study.laws.items()},
        "chosen": study.chosen.form.name if study.chosen else None,
        "paper_reading": fit.paper_reading(study.optima),
        "paper": {"k": fit.PAPER[0], "b": fit.PAPER[1]},
        "prediction": asdict(prediction) if prediction else None,
        "cost": {
            **asdict(saving),
            "saved": saving.saved,
            "breaks_even": saving.breaks_even(False),
            "breaks_even_with_teachers": saving.breaks_even(True),
        }
        if saving
        else None,
        "remarks": [*study.remarks, *doubts],
    }
    return json.dumps(_rounded(content), indent=1) + "\n"


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


def _doubts_of_runs(records: Sequence[Record], teachers: Sequence[Teacher]) -> list[str]:
    """What to keep in mind about the runs themselves."""
    found = []
    if records[0].init != "random":
        found.append(
            f"students began from {records[0].init} weights, so a seed decides the order of their text and nothing "
            "else: intervals do not know how another training of the teachers would have come out"
        )
    own = [teacher for teacher in teachers if teacher.loss is not None]
    if own and (best := min(own, key=lambda teacher: teacher.loss or 0.0)) is not own[-1]:
        found.append(
            f"the best teacher by its own loss is that of {best.size:,} parameters, not the largest: a student that "
            "gets worse beyond it may only have had a worse teacher"
        )
    return found


def _doubts(optima: Sequence[tuple[Curve, Optimum]], chosen: Law | None) -> list[str]:
    """What to keep in mind about the optima and the law."""
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
        elif best.status == curves.NO_CURSE and best.chance is not None and best.rise <= best.chance:
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
    """Students left out of the fit whose optimum lies where the law does not put it."""
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


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
