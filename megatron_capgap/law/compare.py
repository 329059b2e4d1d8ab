"""Cross-validation of the model of all cells against laws with few parameters, on unseen students.

Each model is fitted without one student and predicts that student's losses and best teacher, for every student in turn.
It is also fitted to the smaller half of the students to predict the larger half, and fitted without one size of
teachers to predict the losses of their students, for every size in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from megatron_capgap.law.cells import Array, Cells, Mask
from megatron_capgap.law.gaussian_process import Process

MILLION = 1e6
Model = Callable[[Cells, Array, Cells, Array], Array]
"""(known runs, their teachers' own losses `[n]`, other runs, theirs `[m]`) -> predicted losses of the other runs `[m]`,
whose actual losses are not used."""
LEAST_STUDENTS = LEAST_TEACHERS = 3
RULES = (2.5, 1.5)


@dataclass(frozen=True)
class Score:
    """How well a model predicts unseen students."""

    model: str
    error: float | None
    """Root mean square error of the losses, nats per token; None for rules, which predict no losses."""
    regret: float
    """Mean over students of the loss under the chosen one of the tried teachers, above that under the best of them."""
    worst: float
    """The largest of these regrets."""
    small_to_large: float | None
    """The error when the larger half of the students is predicted from the smaller half."""
    teacher_out: float | None
    """The error when each size of teachers is predicted from the others, for students that have others; None for rules,
    and for fewer than LEAST_TEACHERS sizes."""


def scores(cells: Cells, losses: Array | None) -> list[Score]:
    """All models, in the order of MODELS; none for fewer than LEAST_STUDENTS students.

    Args:
        cells: the runs.
        losses: the teachers' own held-out losses `[n]`; None if some are unknown, which leaves out the laws that need
            them.
    """
    students = cells.students()
    if len(students) < LEAST_STUDENTS:
        return []
    inputs = np.zeros(len(cells)) if losses is None else losses
    found = []
    for name, (model, needs_losses) in MODELS.items():
        if needs_losses and losses is None:
            continue

        def predict(inside: Mask, model: Model = model) -> Array:
            return model(cells.chosen(inside), inputs[inside], cells.chosen(~inside), inputs[~inside])

        errors, regrets = [], []
        for student in students:
            mine = cells.student == student
            predicted = predict(~mine)
            errors.append(predicted - cells.loss[mine])
            regrets.append(_regret(cells.chosen(mine), predicted))
        smaller = cells.student <= students[(len(students) - 1) // 2]
        ahead = predict(smaller) - cells.loss[~smaller]
        one_out = _rms(np.concatenate(errors))
        without = _teachers_out(cells, predict)
        found.append(Score(name, one_out, float(np.mean(regrets)), float(np.max(regrets)), _rms(ahead), without))
    for k in RULES:
        chosen = [cells.chosen(cells.student == student) for student in students]
        regrets = [_regret(mine, np.abs(np.log(mine.teacher / (k * mine.student)))) for mine in chosen]
        found.append(Score(f"rule T = {k:g} S", None, float(np.mean(regrets)), float(np.max(regrets)), None, None))
    return found


def _teachers_out(cells: Cells, predict: Callable[[Mask], Array]) -> float | None:
    """The error over all sizes of teachers, each predicted from the others."""
    sizes = np.unique(cells.teacher)
    if len(sizes) < LEAST_TEACHERS:
        return None
    errors = []
    for size in sizes:
        mine = cells.teacher == size
        elsewhere = np.isin(cells.student, cells.student[~mine])[mine]
        errors.append((predict(~mine) - cells.loss[mine])[elsewhere])
    return _rms(np.concatenate(errors))


def all_cells(known: Cells, losses: Array, new: Cells, new_losses: Array) -> Array:
    """The model of all cells. The level of an unseen student is a line in log S through the known levels. An unseen
    training is described by its own loss."""
    process = Process(known, np.random.default_rng(0))
    luck = process.teachers()
    levels = {}
    for student in known.students():
        mine = known.student == student
        curve = process.mean(student, process.d[mine])
        levels[student] = float(np.mean(known.loss[mine] - curve - luck[known.training[mine]]))
    line = np.polyfit(np.log(list(levels)), list(levels.values()), 1 if len(levels) > 1 else 0)
    found = process.effects(new.training, new.quality)
    for student in new.students():
        mine = new.student == student
        curve = process.mean(student, np.log(new.teacher[mine] / student))
        found[mine] += levels.get(student, np.polyval(line, np.log(student))) + curve
    return found


def five_numbers(known: Cells, losses: Array, new: Cells, new_losses: Array) -> Array:
    """a + b log S + c log(T/S) + d L_T + e log S log(T/S): pruning enters through the terms in log(T/S)."""

    def design(cells: Cells, own: Array) -> Array:
        size, ratio = np.log(cells.student / MILLION), np.log(cells.teacher / cells.student)
        return np.stack([np.ones(len(cells)), size, ratio, own, size * ratio], axis=1)

    numbers, *_ = np.linalg.lstsq(design(known, losses), known.loss, rcond=None)
    return design(new, new_losses) @ numbers


def apple(known: Cells, losses: Array, new: Cells, new_losses: Array) -> Array:
    """Busbridge et al. 2025 (arXiv 2502.08606), equation 8, for one number of student tokens: the teacher enters only
    through its own loss, and there is no term for pruning. Weak priors, several starting points."""

    def law(p: Array, cells: Cells, own: Array) -> Array:
        size = np.log(cells.student / MILLION)
        alone = p[7] + np.exp(p[8] - p[9] * size)  # the student's loss without a teacher
        capacity = np.exp(p[1]) * np.exp(p[2]) * np.logaddexp(0, (np.log(own) - np.log(alone) - p[3]) / np.exp(p[2]))
        return own + np.exp(-p[0] * np.log(own) - capacity + 0.5 * np.logaddexp(p[4] - p[5] * size, p[6]))

    median = np.array([2.5, 2.0, -2.0, 0.2, 0.0, 0.3, -1.0, 0.9 * losses.min(), 0.0, 0.3])
    sd = np.array([3.0, 3.0, 1.5, 0.3, 4.0, 0.4, 4.0, 1.0, 1.0, 0.4])
    random, best = np.random.default_rng(0), None
    for start in median + sd * random.uniform(-1, 1, (APPLE_STARTS, len(median))):

        def misses(p: Array) -> Array:
            with np.errstate(all="ignore"):
                error = law(p, known, losses) - known.loss
            return np.append(np.nan_to_num(error, nan=1e3, posinf=1e3, neginf=-1e3) / 0.01, 0.3 * (p - median) / sd)

        fitted = optimize.least_squares(misses, start, max_nfev=100)
        if best is None or fitted.cost < best.cost:
            best = fitted
    assert best is not None
    return law(best.x, new, new_losses)


APPLE_STARTS = 6
MODELS: dict[str, tuple[Model, bool]] = {
    "model of all cells": (all_cells, False),
    "five numbers, with a term for the cut": (five_numbers, True),
    "Apple's law, without one": (apple, True),
}
"""By name: the model, and whether it needs the teachers' own losses."""


def _regret(cells: Cells, predicted: Array) -> float:
    """Regret of one student from the teacher that is predicted to be the best; runs `[n]` of all its seeds."""
    teachers = np.unique(cells.teacher)
    seen, expected = ([np.mean(each[cells.teacher == size]) for size in teachers] for each in (cells.loss, predicted))
    return float(seen[int(np.argmin(expected))] - min(seen))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
