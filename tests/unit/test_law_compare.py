"""Models that foretell unseen students: each is exact on its own law, and the rules' regrets are those by hand."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from megatron_capgap.law import compare
from megatron_capgap.law.cells import cells
from megatron_capgap.law.compare import Score
from megatron_capgap.law.records import Record
from tests.support import law as made

STUDENTS, TEACHERS = (1e6, 2e6, 4e6, 8e6), tuple(np.geomspace(1.3e6, 9e7, 8))


def scores(loss: Callable[[float, float, float], float], told: bool = True, **grid: object) -> dict[str, Score]:
    """Of a truth that takes student, teacher and the teacher's own loss, with trainings that differ."""
    random = np.random.default_rng(0)
    sizes = grid.get("teachers", TEACHERS)
    own = {int(size): 4.0 * (size / 1e6) ** -0.06 + 0.01 * random.standard_normal() for size in sizes}

    def truth(student: float, teacher: float) -> float:
        return loss(student, teacher, own[int(teacher)])

    drawn = made.draw(truth, random, 0.0, **{"students": STUDENTS, "teachers": TEACHERS, "seeds": [1]} | grid)
    # The draw's own shift of a curve is of its seed; here a student's level follows its size.
    some: list[Record] = [
        replace(
            each,
            valid_loss=truth(each.student_params, each.teacher_params),
            teacher_valid_loss=own[each.teacher_params] if told else None,
        )
        for each in drawn
    ]
    losses = np.array([each.teacher_valid_loss for each in some], dtype=float) if told else None
    return {each.model: each for each in compare.scores(cells(some, "non-embedding"), losses)}


def cut(student: float, teacher: float, own: float) -> float:
    size, ratio = np.log(student / 1e6), np.log(teacher / student)
    return 1.0 - 0.07 * size + 0.01 * ratio + 0.8 * own - 0.02 * size * ratio


def test_five_numbers_are_exact_on_their_law() -> None:
    found = scores(cut)
    exact = found["five numbers, with a term for the cut"]
    assert exact.error == pytest.approx(0, abs=1e-9) and exact.worst == 0
    assert exact.small_to_large == pytest.approx(0, abs=1e-9)
    assert exact.teacher_out == pytest.approx(0, abs=1e-9) and found["rule T = 2.5 S"].teacher_out is None
    assert exact.teacher_out < found["model of all cells"].teacher_out < 0.03
    assert found["model of all cells"].error < 0.03


def test_apples_law_is_found_on_its_own_losses() -> None:
    """Teachers enter by their own losses alone."""

    def truth(student: float, teacher: float, own: float) -> float:
        alone = 3.4 + (student / 1e6) ** -0.3
        capacity = np.exp(1.5) * 0.1 * np.logaddexp(0, np.log(own / alone) / 0.1)
        return own + own**-1.5 * np.exp(-capacity) * (student / 1e6) ** -0.15

    found = scores(truth)
    assert found["Apple's law, without one"].error < 0.02
    assert found["Apple's law, without one"].worst < 0.01


def test_rules_and_regrets_by_hand() -> None:
    found = scores(lambda s, t, own: made.exact(s, t), told=False)
    assert list(found) == ["model of all cells", "rule T = 2.5 S", "rule T = 1.5 S"]
    for k in compare.RULES:
        regrets = []
        for student in STUDENTS:
            had = [size for size in TEACHERS if size > student]
            chosen = min(had, key=lambda size: abs(np.log(size / (k * student))))
            losses = [made.exact(int(student), int(size)) for size in had]
            regrets.append(made.exact(int(student), int(chosen)) - min(losses))
        assert found[f"rule T = {k:g} S"].regret == pytest.approx(np.mean(regrets))
        assert found[f"rule T = {k:g} S"].worst == pytest.approx(max(regrets))
        assert found[f"rule T = {k:g} S"].error is None
    assert found["model of all cells"].error < 0.03 and found["model of all cells"].worst < 0.001


def test_two_students_are_too_few() -> None:
    assert scores(cut, students=STUDENTS[:2]) == {}
