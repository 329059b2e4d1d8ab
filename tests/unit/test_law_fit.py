"""The fit against laws whose truth is known, and how often its intervals hold that truth."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megatron_capgap.law import curves, fit, study
from megatron_capgap.law.records import Record
from megatron_capgap.law.study import Study
from tests.support import law as made

DRAWS = 200
APPLE_STUDENTS = (4e7, 8e7, 1.6e8, 3.2e8)
APPLE_TEACHERS = tuple(np.geomspace(1e8, 1.2e10, 11))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def studies(draw: Callable[[np.random.Generator], list[Record]]) -> list[Study]:
    return [study.study(draw(generator(1000 + number)), "non-embedding") for number in range(DRAWS)]


def share_within(found: Sequence[Study], name: str, symbol: str, truth: float) -> float:
    """How often the interval of a parameter holds its true value."""
    bounds = [each.laws[name].intervals()[symbol] for each in found if name in each.laws]
    assert len(bounds) == len(found), "a draw without a law"
    return float(np.mean([low <= truth <= high for low, high in bounds]))


def test_without_noise_the_law_is_found_exactly() -> None:
    found = study.study(made.draw(made.exact, generator(), noise=0.0), "non-embedding")
    assert [best.status for _, best in found.optima] == ["optimum"] * 4
    assert found.laws["proportional"].values()["k"] == pytest.approx(2.5, rel=1e-9)
    assert found.laws["affine"].values() == pytest.approx({"k": 2.5, "b": 0.0}, abs=1e-3)
    assert found.laws["power"].values() == pytest.approx({"c": 2.5, "g": 1.0}, rel=1e-6)
    for each in found.laws.values():
        assert each.r2 == pytest.approx(1.0) and each.leave_one_out < 1e-6 and each.holdout < 1e-6
    assert found.chosen is found.laws["proportional"]
    # The paper reads the grid: 2.5e6, 4e6 or 6.5e6, 1.1e7, 1.8e7.
    assert found.optima[0][1].best == 2.5e6 and 2.0 < fit.paper_reading(found.optima)["k"] < 3.0


def test_an_intercept_and_a_power_are_found() -> None:
    def line(student: float, teacher: float) -> float:
        return 3 + 0.05 * np.log(teacher / (3 * student - 1e6)) ** 2

    def bent(student: float, teacher: float) -> float:
        return 3 + 0.05 * np.log(teacher / (2.0 * (student / 1e6) ** 1.4 * 1e6)) ** 2

    found = study.study(made.draw(line, generator(), noise=0.0), "non-embedding")
    assert found.laws["affine"].values() == pytest.approx({"k": 3.0, "b": -1e6}, rel=1e-4)
    assert found.chosen is found.laws["affine"]
    found = study.study(made.draw(bent, generator(), noise=0.0), "non-embedding")
    assert found.laws["power"].values()["g"] == pytest.approx(1.4, rel=1e-6)
    assert found.chosen is found.laws["power"]


@pytest.mark.slow
def test_coverage_of_an_exact_law() -> None:
    found = studies(lambda random: made.draw(made.exact, random, noise=0.004))
    assert 0.85 <= share_within(found, "proportional", "k", 2.5) <= 0.95
    assert 0.85 <= share_within(found, "affine", "k", 2.5) <= 0.95
    assert 0.85 <= share_within(found, "power", "g", 1.0) <= 0.95
    # The optima of the single students, from their seeds alone.
    held = [
        best.interval[0] <= 2.5 * curve.student <= best.interval[1]
        for each in found
        for curve, best in each.optima
        if best.interval is not None
    ]
    assert len(held) > 3 * DRAWS and 0.85 <= np.mean(held) <= 0.95


@pytest.mark.slow
def test_coverage_where_students_scatter_about_the_law() -> None:
    """Each student has an optimum of its own, 20% about the law: seeds alone could not tell how sure the law is."""

    def draw(random: np.random.Generator) -> list[Record]:
        own = {student: 2.5 * np.exp(0.2 * random.standard_normal()) for student in made.STUDENTS}
        return made.draw(lambda s, t: made.exact(s, t, own[s]), random, noise=0.002)

    assert 0.85 <= share_within(studies(draw), "proportional", "k", 2.5) <= 0.95


@pytest.mark.slow
def test_coverage_of_apples_law() -> None:
    """No line through zero and no parabola: the truth is the power law through the true optima of the same students."""
    optima = [made.lowest(made.apple, student, APPLE_TEACHERS) for student in APPLE_STUDENTS]
    slope = float(np.polyfit(np.log(APPLE_STUDENTS), np.log(optima), 1)[0])
    found = studies(
        lambda random: made.draw(made.apple, random, 0.002, students=APPLE_STUDENTS, teachers=APPLE_TEACHERS)
    )
    assert 0.85 <= share_within(found, "power", "g", slope) <= 0.95


@pytest.mark.slow
def test_no_optimum_is_said() -> None:
    found = studies(lambda random: made.draw(made.no_optimum, random, noise=0.004))
    seen = [best.status for each in found for _, best in each.optima]
    assert seen.count(curves.NO_CURSE) >= 0.95 * len(seen)
    without = [each for each in found if each.chosen is None]
    assert len(without) >= 0.9 * DRAWS
    assert all("no curse seen" in " ".join(each.remarks) for each in without)
    assert "no student has shown an optimum inside the grid, so there is no law to draw" in without[0].remarks


def test_edges_are_censored_and_left_out() -> None:
    teachers = [teacher for teacher in made.TEACHERS if 3e6 < teacher < 15e6]
    found = study.study(made.draw(made.exact, generator(), 0.0, teachers=teachers), "non-embedding")
    assert [(best.status, best.censored) for _, best in found.optima] == [
        ("edge", "below"),
        ("optimum", None),
        ("too few teachers", None),
        ("too few teachers", None),
    ] or [best.censored for _, best in found.optima][0] == "below"
    assert any("censored" in text and "1,000,000" in text for text in found.remarks)
    assert any("stands on" in text for text in found.remarks)
