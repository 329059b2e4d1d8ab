"""The start and the teaching, told apart on made-up runs whose parts are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_capgap.law import analysis, causes
from megatron_capgap.law.records import Record
from tests.support import law as made
from tools import fit_law

TEACHERS = tuple(np.geomspace(1.3e6, 9e7, 7))


def cut(student: float, teacher: float) -> float:
    return 3.0 - 0.1 * np.log(student / 1e6) + 0.03 * np.log(teacher / student)


def gain(student: float, teacher: float) -> float:
    return 0.08 - 0.01 * np.log(teacher / student)


def both_arms(init: str = "pruned", share: float = 1.0, noise: float = 0.001) -> list[Record]:
    """Every start taught and on labels alone; its luck is in both. `share` of the gain is really there."""
    random, found = np.random.default_rng(0), []
    for each in made.draw(cut, random, 0.0, students=(1e6, 3e6, 8e6), teachers=TEACHERS, init=init):
        luck = 0.02 * random.standard_normal()
        alone = each.valid_loss + (luck if init == "pruned" else 0.0)
        if init != "pruned":
            alone = cut(each.student_params, 4 * each.student_params)
        given = share * gain(each.student_params, each.teacher_params)
        taught, labels = (value + noise * random.standard_normal() for value in (alone - given, alone))
        found.append(replace(each, valid_loss=taught))
        found.append(replace(each, valid_loss=labels, taught=False, objective="1 cross_entropy"))
    return found


def test_the_two_causes_are_found() -> None:
    some = both_arms()
    found = causes.causes([each for each in some if each.taught], some, "non-embedding")
    assert [each.student for each in found] == pytest.approx([1e6, 3e6, 8e6], rel=1e-3)
    for each in found:
        reach = np.log(each.grid[-1] / each.grid[0])
        assert each.pairs == 2 * sum(size > each.student for size in TEACHERS)
        assert each.start is not None and each.rise_of_start == pytest.approx(0.03 * reach, abs=0.03)
        assert each.loss_of_teaching == pytest.approx(0.01 * reach, abs=0.004)
        true = np.array([gain(each.student, size) for size in each.grid])
        assert np.abs(each.teaching[1] - true).max() < 0.004
        inside = (each.teaching[0] - 0.001 <= true) & (true <= each.teaching[2] + 0.001)
        assert inside.mean() > 0.8


def test_one_start_for_all_teachers_has_one_run_on_labels_alone() -> None:
    some = both_arms("random")
    taught = [each for each in some if each.taught]
    first = {(each.student_params, each.seed): each for each in reversed(some) if not each.taught}
    found = causes.causes(taught, [*taught, *first.values()], "non-embedding")
    assert [each.start for each in found] == [None] * 3
    assert all(each.pairs == 2 * sum(size > each.student for size in TEACHERS) for each in found)
    assert all(each.loss_of_teaching > 0.01 for each in found)


def test_runs_of_other_conditions_are_no_counterparts() -> None:
    some = both_arms()
    taught = [each for each in some if each.taught]
    for change in ({"tokens": 7}, {"tokenizer": "other"}, {"init": "fixed"}, {"seed": 9}, {"teacher_seed": 9}):
        other = [each if each.taught else replace(each, **change) for each in some]
        assert causes.causes(taught, other, "non-embedding") == [], change
    assert causes.causes([each for each in some if not each.taught], some, "non-embedding") == []


def test_teaching_that_gives_nothing_is_advised_against() -> None:
    for share, advised in ((1.0, 0), (0.0, 3)):
        some = both_arms(share=share, noise=0.0003)
        found = analysis.analyse([each for each in some if each.taught], "non-embedding", some)
        assert sum("do not distil it; no teacher gives 0.002 nats" in text for text in found.remarks) == advised


def test_the_report_has_them(tmp_path: Path) -> None:
    path = made.save(both_arms(), tmp_path / "both.jsonl")
    words = ["--records", path, "--out", str(tmp_path / "law"), "--where", "taught=true"]
    assert fit_law.main(words) == 0
    report = (tmp_path / "law" / "report.md").read_text()
    assert "## Effects of initialisation and teaching" in report and "![the start and" in report
    assert "only the same starts trained without a teacher" not in report
    assert (tmp_path / "law" / "causes.png").stat().st_size > 10_000
    alone = analysis.analyse([each for each in both_arms() if each.taught], "non-embedding")
    assert alone.causes == [] and any("only the same starts" in text for text in alone.remarks)
