"""Distilling against labels alone for the same operations, on made-up runs whose losses are known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_capgap.law import labels
from megatron_capgap.law.cells import cells
from megatron_capgap.law.gaussian_process import Process
from megatron_capgap.law.levels import losses
from megatron_capgap.law.records import Record
from tests.support import law as made
from tools import fit_law

TEACHERS = tuple(np.geomspace(1.3e6, 4e7, 6))
TOKENS = 5_000_000
FALL = 0.05
"""Nats that e times the tokens gain on labels alone."""


def alone(student: float, tokens: float) -> float:
    return 3.0 - 0.1 * np.log(student / 1e6) - FALL * np.log(tokens / TOKENS)


def gain(student: float, teacher: float) -> float:
    return 0.06 - 0.005 * np.log(teacher / student)


def runs(share: float = 1.0, more: tuple[int, ...] = (2, 4, 8), init: str = "fixed") -> list[Record]:
    """Taught runs, and runs on labels alone on several times their tokens; `share` of the gain is really there."""
    random, found = np.random.default_rng(0), []
    for student in (1e6, 2e6, 4e6):
        for seed in (1, 2):
            sizes = {"student_params": int(student), "student_params_total": int(1.3 * student), "seed": seed}
            common = {**sizes, "init": init, "tokens": TOKENS}
            for teacher in (size for size in TEACHERS if size > student):
                loss = alone(student, TOKENS) - share * gain(student, teacher) + 0.001 * random.standard_normal()
                size = {"teacher_params": int(teacher), "teacher_params_total": int(1.3 * teacher)}
                found.append(made.record(**common, **size, valid_loss=loss))
            for times in (1, *more):
                loss = alone(student, times * TOKENS) + 0.001 * random.standard_normal()
                other = {"valid_loss": loss, "tokens": times * TOKENS, "taught": False, "objective": "1 cross_entropy"}
                found.append(made.record(**common | other, teacher_params_total=10**8))
    return found


def compared(some: list[Record], student: float, **more: Any) -> Any:
    taught = [each for each in some if each.taught]
    teachers = {f"{size:.0f}": size for size in TEACHERS if size > student}
    return labels.against(taught, some, "non-embedding", student, teachers, **more)


@pytest.mark.parametrize("student", [2e6, 2.8e6])
def test_the_difference_at_equal_operations_is_that_of_the_truth(student: float) -> None:
    """Of a student of the data, and of one between two of them."""
    found = compared(runs(), student)
    for name, each in found.items():
        teacher = float(name)
        assert each.times == pytest.approx((6 * student + 2 * teacher) / (6 * student))
        true = gain(student, teacher) - FALL * np.log(each.times)
        assert each.gain[1] == pytest.approx(true, abs=0.004)
        assert each.gain[0] - 0.002 < true < each.gain[2] + 0.002
        if abs(true) > 0.01:
            assert (each.probability > 0.95) == (true > 0)
    signs = {each.gain[1] > 0 for each in found.values()}
    assert signs == {True, False}  # a small teacher wins, a large one costs more than it gives


def test_where_nothing_can_be_told_it_says_why() -> None:
    some = runs()
    assert "no runs on labels alone" in compared([each for each in some if each.taught], 2e6)
    assert compared(runs(more=()), 2e6) == "all 6 runs on labels alone have the same tokens, 5M"
    assert "0 taught runs have one" in compared(
        [replace(each, seed=9) if not each.taught else each for each in some], 2e6
    )
    assert "no runs on labels alone" in compared([replace(e, tokenizer="b") if not e.taught else e for e in some], 2e6)
    lone = [each for number, each in enumerate(runs(more=(2,))) if each.taught or each.tokens == TOKENS or number > 900]
    lone += [replace(some[-1], seed=7, tokens=2 * TOKENS)]
    assert "do not tell what further tokens gain" in compared(lone, 2e6)
    assert "for the same FLOPs labels alone train on up to" in compared(some, 2e6, tokens=1e9)


def test_levels_of_a_student_and_of_one_between() -> None:
    some = [each for each in runs() if each.taught]
    process = Process(cells(some, "non-embedding"), np.random.default_rng(0))
    ratios = np.log([2.0, 4.0, 8.0])
    for student in (2e6, 2.8e6):
        drawn = losses(process, student, ratios, 1000)
        assert drawn.shape == (1000, 3)
        true = [alone(student, TOKENS) - gain(student, student * np.exp(ratio)) for ratio in ratios]
        assert drawn.mean(axis=0) == pytest.approx(true, abs=0.003)
        assert 0.0001 < drawn.std(axis=0).max() < 0.01


def advice(some: list[Record], tmp_path: Path, capsys: Any, *words: str) -> tuple[str, dict[str, Any]]:
    """The first line that is printed, and the advice in law.json."""
    catalogue = tmp_path / "catalogue.yaml"
    shapes = {"small": {"hidden": 256, "ffn": 900}, "large": {"hidden": 600, "ffn": 2200}}
    told = {name: {"layers": 4, "heads": 4, "vocab": 100, **shape} for name, shape in shapes.items()}
    catalogue.write_text(json.dumps({"a": told}))
    path = made.save(some, tmp_path / "records.jsonl")
    begin = ["--records", path, "--out", str(tmp_path / "law"), "--student-params", "2M", "--catalogue", str(catalogue)]
    assert fit_law.main([*begin, *words]) == 0
    return capsys.readouterr().out.splitlines()[0], json.loads((tmp_path / "law" / "law.json").read_text())["advice"]


def test_do_not_distil_comes_first(tmp_path: Path, capsys: Any) -> None:
    said, told = advice(runs(share=0.0), tmp_path, capsys)
    assert said.startswith("do not distil: even with a/small the student ends 0.0")
    assert "higher than on labels alone for the same FLOPs, which are 1.6" in said
    assert all(each["against"]["gain"][1] < 0 for each in told["candidates"])
    report = (tmp_path / "law" / "report.md").read_text()
    assert report.index("**Do not distil: even") < report.index("expected regret")
    assert (tmp_path / "law" / "price.png").stat().st_size > 10_000
    assert "![price and loss](price.png)" in report


def test_distilling_that_pays_and_what_cannot_be_told(tmp_path: Path, capsys: Any) -> None:
    said, told = advice(runs(share=2.0), tmp_path, capsys)
    assert said.startswith("distil: with a/small the student ends 0.") and told["labels"] is None
    said, told = advice(runs(more=()), tmp_path, capsys)
    assert said.endswith("these runs cannot tell, for all 6 runs on labels alone have the same tokens, 5M")
    assert told["labels"].startswith("all 6 runs") and told["candidates"][0]["against"] is None
