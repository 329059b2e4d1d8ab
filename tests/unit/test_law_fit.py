"""The fit against laws whose truth is known, and how often its intervals hold that truth."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megatron_capgap.law import curves, fit, paper_reading
from megatron_capgap.law.paper_reading import PaperFit
from megatron_capgap.law.records import Record
from tests.support import law as made

DRAWS = 200
APPLE_STUDENTS = (8e7, 1.6e8, 3.2e8, 6.4e8)
APPLE_TEACHERS = tuple(np.geomspace(1e8, 3e10, 14))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def studies(draw: Callable[[np.random.Generator], list[Record]]) -> list[PaperFit]:
    return [paper_reading.read(draw(generator(1000 + number)), "non-embedding") for number in range(DRAWS)]


def share_within(found: Sequence[PaperFit], name: str, symbol: str, truth: float) -> float:
    """How often the interval of a parameter holds its true value."""
    bounds = [each.laws[name].intervals()[symbol] for each in found if name in each.laws]
    assert len(bounds) == len(found), "a draw without a law"
    return float(np.mean([low <= truth <= high for low, high in bounds]))


def test_without_noise_the_law_is_found_exactly() -> None:
    found = paper_reading.read(made.draw(made.exact, generator(), noise=0.0), "non-embedding")
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

    found = paper_reading.read(made.draw(line, generator(), noise=0.0), "non-embedding")
    assert found.laws["affine"].values() == pytest.approx({"k": 3.0, "b": -1e6}, rel=1e-4)
    assert found.chosen is found.laws["affine"]
    found = paper_reading.read(made.draw(bent, generator(), noise=0.0), "non-embedding")
    assert found.laws["power"].values()["g"] == pytest.approx(1.4, rel=1e-6)
    assert found.chosen is found.laws["power"]


@pytest.mark.slow("a share is seen only in many draws")
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


@pytest.mark.slow("a share is seen only in many draws")
def test_coverage_where_students_scatter_about_the_law() -> None:
    """Each student has an optimum of its own, 20% about the law: seeds alone could not tell how sure the law is."""

    def draw(random: np.random.Generator) -> list[Record]:
        own = {student: 2.5 * np.exp(0.2 * random.standard_normal()) for student in made.STUDENTS}
        return made.draw(lambda s, t: made.exact(s, t, own[s]), random, noise=0.002)

    assert 0.85 <= share_within(studies(draw), "proportional", "k", 2.5) <= 0.95


@pytest.mark.slow("a share is seen only in many draws")
def test_coverage_of_apples_law() -> None:
    """No parabolas: steep below the optimum, gentle above. The truth is the power law through the true optima of the
    same students. Its exponent is held; its level is read too high, by up to a tenth."""
    optima = [made.lowest(made.apple, student, APPLE_TEACHERS) for student in APPLE_STUDENTS]
    slope = float(np.polyfit(np.log(APPLE_STUDENTS), np.log(optima), 1)[0])
    level = float(np.exp(np.mean(np.log(np.array(optima) / APPLE_STUDENTS))))
    found = studies(
        lambda random: made.draw(made.apple, random, 0.001, students=APPLE_STUDENTS, teachers=APPLE_TEACHERS)
    )
    assert 0.85 <= share_within(found, "power", "g", slope) <= 0.95
    read = np.median([each.laws["proportional"].values()["k"] for each in found])
    assert 1.0 < read / level < 1.1


@pytest.mark.slow("a share is seen only in many draws")
def test_no_optimum_is_said() -> None:
    found = studies(lambda random: made.draw(made.no_optimum, random, noise=0.004))
    seen = [best.status for each in found for _, best in each.optima]
    assert seen.count(curves.NO_CURSE) >= 0.95 * len(seen)
    without = [each for each in found if each.chosen is None]
    assert len(without) >= 0.9 * DRAWS
    assert all("no curse seen" in " ".join(each.remarks) for each in without)
    assert "no student has shown an optimum inside the grid, so there is no law to draw" in without[0].remarks


def test_edges_are_censored_and_left_out() -> None:
    # Optima at 2.5M, 5M, 10M and 20M.
    found = paper_reading.read(
        made.draw(made.exact, generator(), 0.0, teachers=[3.6e6, 6.5e6, 1.1e7, 1.8e7]), "non-embedding"
    )
    assert [(best.status, best.censored) for _, best in found.optima] == [
        ("edge", "below"),
        ("optimum", None),
        ("optimum", None),
        ("too few teachers", None),
    ]
    assert len(found.chosen.students) == 2
    text = "\n".join(found.remarks)
    assert "student of 1,000,000: the smallest teacher, of 3,600,000, is the best, so its optimum is censored" in text
    assert "student of 8,000,000: 2 teacher(s); a curve needs at least 3" in text
    assert "the law stands on 2 student(s); with fewer than 3" in text
    # The same students below their optimum: the loss only falls.
    found = paper_reading.read(made.draw(made.exact, generator(), 0.0, teachers=[1.1e6, 1.5e6, 2e6]), "non-embedding")
    assert (found.optima[0][1].status, found.optima[0][1].censored) == ("no curse seen", "above")
    assert "no curse seen; the largest teacher, of 2,000,000, is the best" in found.remarks[0]


def test_a_censored_student_that_contradicts_the_law_is_named() -> None:
    def loss(student: float, teacher: float) -> float:
        return made.exact(student, teacher, 2.5 if student < 8e6 else 20.0)

    found = paper_reading.read(made.draw(loss, generator(), 0.0), "non-embedding")
    assert len(found.chosen.students) == 3
    assert found.remarks[-1] == ("student of 8,000,000: the law says 20,000,000, its own runs say 80,000,000 or more")


def test_one_seed_and_three_teachers_leave_the_interval_open() -> None:
    some = made.draw(made.exact, generator(), 0.001, students=[2e6], teachers=[2.5e6, 5e6, 1e7], seeds=(1,))
    found = paper_reading.read(some, "non-embedding")
    assert found.optima[0][1].interval is None and found.chosen.intervals() is None
    assert any("do not tell how sure its optimum is" in text for text in found.remarks)
    assert found.optima[0][1].chance is None and found.optima[0][1].rise > 0
    assert any("with one seed nothing tells whether its rise" in text for text in found.remarks)


def test_a_rise_within_what_seeds_bring_about_is_no_curse() -> None:
    """Losses of the law sweep's student with a fixed start: a parabola alone has an optimum in them."""
    mean = np.array([4.83731, 4.82948, 4.82292, 4.82706, 4.82583, 4.82542])
    apart = np.array([0.005, -0.008, 0.004, -0.002, 0.003, -0.002])
    for scale, status in ((1.0, curves.NO_CURSE), (0.05, curves.OPTIMUM)):
        losses = np.stack([mean + scale * apart, mean - scale * apart])
        curve = curves.Curve(201_280, np.array([3e5, 6e5, 1.2e6, 2.4e6, 4.9e6, 9.7e6]), (1, 2), losses)
        best = curves.optimum(curve, generator())
        assert (best.status, best.best) == (status, 1.2e6), best
        assert best.rise == pytest.approx(0.0025) and (best.rise > best.chance) == (status == curves.OPTIMUM)
        # By hand: the mean square about both levels has 5 degrees of freedom, whose t of 0.1 / 5 is 2.757.
        noise = 2 * np.sum((scale * (apart - apart.mean())) ** 2) / 5
        assert best.chance == pytest.approx(2.757 * np.sqrt(noise), rel=1e-3)


@pytest.mark.slow("a share is seen only in many draws")
@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3)])
def test_flat_curves_rise_by_chance_as_seldom_as_is_said(seeds: tuple[int, ...]) -> None:
    """Flat altogether, or behind a steep fall up to a teacher of 5 S."""

    def falling(student: float, teacher: float) -> float:
        return 3.0 + 0.02 * max(0.0, np.log(5 * student / teacher)) ** 2

    for loss in (lambda student, teacher: 3.0, falling):
        drawn = studies(lambda random, loss=loss: made.draw(loss, random, 0.004, students=[2e6], seeds=seeds))
        seen = [best.status for each in drawn for _, best in each.optima]
        assert np.mean([status != curves.NO_CURSE for status in seen]) <= 1 - curves.LEVEL
