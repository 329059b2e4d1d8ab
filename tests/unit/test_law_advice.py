"""Advice: the regret is the truth's where nothing is noisy, and nothing is said where the data say nothing."""

import numpy as np
import pytest

from megatron_capgap.law.advice import advise
from megatron_capgap.law.cells import cells
from megatron_capgap.law.gaussian_process import Process
from tests.support import law as made

CATALOGUE = {f"{size / 1e6:g}m": size for size in (1e6, 2e6, 4e6, 7.5e6, 1.5e7, 3e7, 6e7, 5e8)}


def fitted(noise: float = 0.001) -> Process:
    teachers = np.geomspace(1.3e6, 9e7, 10)
    some = made.draw(made.exact, np.random.default_rng(0), noise, teachers=teachers)
    return Process(cells(some, "non-embedding"), np.random.default_rng(0))


def test_regret_is_that_of_the_truth() -> None:
    found = advise(fitted(), 3e6, CATALOGUE, tokens=1e9)
    assert found.refusal is None and found.beyond == 1 and found.warnings == ()
    assert found.candidates[0].name == "7.5m" and found.candidates[0].probability > 0.95
    lowest = made.exact(3e6, 7.5e6)
    for each in found.candidates:
        true = made.exact(3e6, each.teacher) - lowest
        assert each.regret == pytest.approx(true, abs=0.004), each.name
        assert each.interval[0] - 1e-4 <= true <= each.interval[1] + 1e-4, each.name
        assert each.flops == (6 * 3e6 + 2 * each.teacher) * 1e9
    assert found.interval is not None and found.interval[0] < 7.5e6 < found.interval[1]
    assert sum(each.probability for each in found.candidates) == pytest.approx(1)
    assert [each.regret for each in found.candidates] == sorted(each.regret for each in found.candidates)


def test_teachers_that_no_ratio_of_the_data_reaches_are_not_judged() -> None:
    found = advise(fitted(), 1e6, CATALOGUE)
    assert found.outside == ("500m",)
    assert {each.name for each in found.candidates} == {"2m", "4m", "7.5m", "15m", "30m", "60m"}
    assert found.candidates[0].flops is None


@pytest.mark.parametrize(
    ("student", "times"), [(3e9, "375 times outside the students of these runs (1M to 8M)"), (1e5, "10 times outside")]
)
def test_a_student_far_outside_is_refused(student: float, times: str) -> None:
    found = advise(fitted(), student, {"7b": 7e9})
    assert found.refusal is not None and times in found.refusal
    assert found.refusal.startswith("nothing here can tell")
    assert found.candidates == () and found.best is None and found.interval is None


def test_a_catalogue_without_a_teacher_in_reach_is_refused() -> None:
    found = advise(fitted(), 8e6, {"small": 8.1e6, "huge": 1e9})
    assert found.refusal is not None and "no teacher of the catalogue is between 8.55M and 90M" in found.refusal
    assert found.outside == ("huge",)


def test_warnings() -> None:
    some = made.draw(lambda s, t: 3.0 - 0.05 * np.log(t / s), np.random.default_rng(0), 0.001)
    process = Process(cells(some, "non-embedding"), np.random.default_rng(0))
    found = advise(process, 1.2e7, {"big": 8e7})
    assert ["extrapolation" in text for text in found.warnings] == [True]
    found = advise(process, 2e6, {"big": 7e7}, init="pruned")
    small, cut = found.warnings
    assert small.startswith("the student has 2.9% of the parameters of big") and "removes 97% of its weights" in cut
    assert len(advise(process, 2e6, {"big": 7e7}, init="random").warnings) == 1
