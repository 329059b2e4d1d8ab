"""What to run next: the gain of a run is that of a dense reference; make_sweep takes the grids of proposed runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_capgap.law import next_runs
from megatron_capgap.law.cells import Cells, cells
from megatron_capgap.law.gaussian_process import JITTER, Process
from megatron_capgap.law.next_runs import NextRunsPlan, TeacherCandidate
from megatron_capgap.law.records import LawError, Record
from tests.support import law as made
from tests.unit.test_law_process import naive_covariance
from tools import fit_law, make_sweep

LUCK = 0.01


def lucky(loss: made.Loss = made.flat, **grid: Any) -> list[Record]:
    """Teachers that differ by luck, trained once."""
    random, found = np.random.default_rng(1), []
    own: dict[int, float] = {}
    for each in made.draw(loss, random, 0.003, **grid):
        shift = own.setdefault(each.teacher_params, LUCK * random.standard_normal())
        found.append(replace(each, valid_loss=each.valid_loss + shift, teacher_seed=1))
    return found


def fitted(records: list[Record]) -> Process:
    return Process(cells(records, "non-embedding"), np.random.default_rng(0))


SMALL = {"students": [1e6], "teachers": (1.5e6, 4e6, 1.1e7), "seeds": [1]}


def by_hand(process: Process, sizes: list[float], run: tuple[float, int, int]) -> float:
    """The gain of one run `(teacher, curve, training)`, by a grid over its loss under each draw of the scales."""
    known, m = process.cells, len(sizes)
    (student,) = known.students()
    everything = Cells(
        np.append(known.student, [student] * (m + 1)),
        np.append(known.teacher, [*sizes, run[0]]),
        np.append(known.curve, [*range(-m, 0), run[1]]),
        np.append(known.training, [*range(-m, 0), run[2]]),
        np.append(known.loss, np.zeros(m + 1)),
        np.append(known.quality, np.zeros(m + 1)),
    )
    n, y = len(known), known.loss - known.loss.mean()
    posteriors = []
    for h in process.draws:
        scales = np.exp(h).tolist()
        size = n + m + 1
        full = np.array([[naive_covariance(everything, scales, i, j) for j in range(size)] for i in range(size)])
        for place in range(n, n + m):  # a curve has no level and no luck
            full[place, place] -= 5.0**2 + scales[4] ** 2
        noisy = full + (scales[5] ** 2 + JITTER) * np.diag([*np.ones(n), *np.zeros(m), 1.0])
        solved = np.linalg.solve(noisy[:n, :n], noisy[:n, n:])
        posteriors.append((solved.T @ y, noisy[n:, n:] - noisy[n:, :n] @ solved))
    ends = [(mean[m] - 9 * spread[m, m] ** 0.5, mean[m] + 9 * spread[m, m] ** 0.5) for mean, spread in posteriors]
    losses = np.linspace(min(low for low, _ in ends), max(high for _, high in ends), 40001)
    density = np.array([np.exp(-0.5 * (losses - mean[m]) ** 2 / v[m, m]) / v[m, m] ** 0.5 for mean, v in posteriors])
    expected = [mean[:m] + np.outer(losses - mean[m], v[:m, m] / v[m, m]) for mean, v in posteriors]
    after = np.einsum("kl,kls->ls", density / density.sum(axis=0), np.array(expected))
    before = int(np.mean([mean[:m] for mean, _ in posteriors], axis=0).argmin())
    weights = density.sum(axis=0) / density.sum()
    return float(weights @ (after[:, before] - after.min(axis=1)))


def test_the_gain_is_that_of_a_dense_reference() -> None:
    """One student, three teachers, two draws of the scales: every single run that is offered."""
    records = lucky(**SMALL)
    process = fitted(records)
    process.draws = np.log([[0.05, 1.5, 0.01, 0.02, 0.03, 0.004], [0.1, 2.0, 0.004, 0.01, 0.01, 0.002]])
    process._factors = [process._factor(h) for h in process.draws]
    sizes = [1.5e6, 4e6, 1.1e7]
    options = next_runs._Options(process, records, "non-embedding", [], None)
    belief = next_runs._Belief.begin(process, {1e6: sizes}, options.runs, 60_000)
    singles = [each[0] for each in options.candidate_steps(set()) if len(each) == 1]
    assert len(singles) == 3  # another training of each size; the cells of the first seed are all there
    runs = [options.runs[number] for number in singles]
    wanted = [by_hand(process, sizes, (run.teacher.size, run.curve, run.training)) for run in runs]
    assert max(wanted) > 1e-4
    assert [belief.gain([number]) for number in singles] == pytest.approx(wanted, rel=0.08, abs=2e-6)


def test_a_new_seed_tells_nothing_alone() -> None:
    records = lucky(**SMALL)
    process = fitted(records)
    options = next_runs._Options(process, records, "non-embedding", [], None)
    belief = next_runs._Belief.begin(process, {1e6: [1.5e6, 4e6, 1.1e7]}, options.runs, 2000)
    pairs = [each for each in options.candidate_steps(set()) if options.runs[each[0]].seed == 2]
    assert len(pairs) == 2 and all(len(pair) == 2 for pair in pairs)
    for pair in pairs:
        assert belief.gain(pair[:1]) < 1e-6 < 1e-5 < belief.gain(pair)


def proposed(records: list[Record], budget: float, **more: Any) -> NextRunsPlan:
    process = fitted(records)
    sizes = sorted({each.teacher_params for each in records})
    targets = {student: [size for size in sizes if size > student] for student in process.cells.students()}
    return next_runs.propose_runs(process, records, "non-embedding", targets, more.pop("teachers", []), budget, **more)


def test_where_all_is_known_nothing_is_proposed() -> None:
    records = lucky(made.exact, **SMALL)
    process, targets = fitted(records), {1e6: [1.5e6, 4e6, 1.1e7]}
    process.draws = np.log([[0.05, 1.5, 0.01, 0.02, 1e-5, 1e-5]] * 2)
    process._factors = [process._factor(h) for h in process.draws]
    found = next_runs.propose_runs(process, records, "non-embedding", targets, [], 1e18)
    assert found.regret < 1e-7 and found.steps == () and found.regret_after == found.regret
    assert found.considered > 5


def test_the_budget_holds_and_a_teacher_is_paid_once() -> None:
    records = lucky(students=[1e6, 2e6], teachers=(2.5e6, 5e6, 1e7, 2e7), seeds=[1])
    everything = proposed(records, 1e18)
    assert everything.regret_after < everything.regret and sum(len(step.trained) for step in everything.steps) > 0
    paid: list[int] = []
    for step in everything.steps:
        distilling = sum((6 * run.student + 2 * run.teacher.size) * 1.3 * 5e6 for run in step.runs)
        sizes = {run.training: run.teacher.size for run in step.runs}
        training = sum(6 * 1.3 * sizes[number] * 1e7 for number in step.trained)
        assert step.flops == pytest.approx(distilling + training, rel=0.01)
        paid += step.trained
    assert len(paid) == len(set(paid))
    made_of = [(run.student, run.training, run.curve) for step in everything.steps for run in step.runs]
    assert len(made_of) == len(set(made_of))
    half = proposed(records, 0.5 * everything.flops)
    assert 0 < half.flops <= 0.5 * everything.flops


def test_teachers_without_tokens_have_no_price() -> None:
    records = [replace(each, teacher_tokens=None) for each in lucky(**SMALL)]
    with pytest.raises(LawError, match="give --teacher-tokens N"):
        proposed(records, 1e18)
    assert proposed(records, 1.0, teacher_tokens=1e7).steps == ()


def test_a_teacher_of_the_catalogue_can_be_trained() -> None:
    """Of a size between those of the data; sizes that are there already are not offered twice."""
    further = [TeacherCandidate("new", 2.6e6, 3e6), TeacherCandidate("old", 4e6, 5e6)]
    records = lucky(**SMALL)
    options = next_runs._Options(fitted(records), records, "non-embedding", further, None)
    names = [run.teacher.name for run in options.runs]
    assert names.count("new") == next_runs.MAX_NEW_SEEDS and "old" not in names
    fresh = [run for run in options.runs if run.teacher.name == "new"]
    assert options.price([options.runs.index(fresh[0])], set()) == (6 * 1.3e6 + 2 * 3e6) * 5e6 + 6 * 3e6 * 1e7


def shape(hidden: int) -> dict[str, Any]:
    return {"layers": 4, "hidden": hidden, "heads": 4, "ffn": 4 * hidden, "vocab": 100}


def sweep_of(tmp_path: Path, init: str) -> tuple[str, str, dict[str, Any]]:
    """Records and the grid that they come from: two students, three teachers, the middle one trained twice."""
    students, teachers = {"s1": 64, "s2": 96}, {"t1": 128, "t2": 192, "t3": 256}
    size = {name: int(fit_law.parameters(shape(h), "non-embedding")) for name, h in {**students, **teachers}.items()}
    grid = {
        "out": "work",
        "common": {"device": "cpu", "data": {"train": ["d/t"], "valid": ["d/v"], "sequence_length": 8}, "seed": 1},
        "teach": {"train": {"steps": 9}, "seed": 50},
        "distill": {"train": {"steps": 5}},
        "teachers": {name: {"model": shape(hidden)} for name, hidden in teachers.items()},
        "students": {name: {"model": shape(hidden)} for name, hidden in students.items()},
        "rows": [{"init": init, "seeds": [1]}],
    }
    grid["common"]["data"]["tokenizer"] = "d/tokenizer.model"
    grid["common"]["train"] = {"global_batch": 4, "micro_batch": 4}
    grid["common"]["optimizer"] = {"lr": 1e-3}
    grid["teachers"]["t2"]["seeds"] = [50, 51]
    trainings = [("t1", 50), ("t2", 50), ("t2", 51), ("t3", 50)]
    random, found = np.random.default_rng(0), []
    luck = dict(zip(trainings, 0.01 * random.standard_normal(len(trainings)), strict=True))
    for student in students:
        for teacher, seed in trainings:
            sizes = {"student_params": size[student], "teacher_params": size[teacher]}
            totals = {f"{key}_total": value + 20_000 for key, value in sizes.items()}
            loss = made.exact(size[student], size[teacher]) + luck[teacher, seed] + 0.002 * random.standard_normal()
            found.append(made.record(**sizes, **totals, init=init, teacher_seed=seed, seed=1, valid_loss=loss))
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return made.save(found, tmp_path / "records.jsonl"), str(path), grid


@pytest.mark.parametrize("init", ["pruned", "fixed"])
def test_the_grid_of_the_plan_is_one_that_make_sweep_takes(
    init: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_runs, "SCALES", 4)  # for speed
    records, path, _ = sweep_of(tmp_path, init)
    words = ["--records", records, "--next", "1e18", "--grid", path, "--out", str(tmp_path / "law")]
    assert fit_law.main(words) == 0
    said = capsys.readouterr().out
    assert "what to run next, within 1e+18 FLOPs" in said and "next.yaml" in said
    told = json.loads((tmp_path / "law" / "law.json").read_text())["next"]
    assert "## What to run next" in (tmp_path / "law" / "report.md").read_text()
    sweep = make_sweep.read_grid(tmp_path / "law" / "next.yaml")
    assert sweep.out == "work-next"
    wanted = sum(len(step["runs"]) for step in told["steps"])
    distilled = [cell for cell in sweep.cells if cell.stage == "distill"]
    assert len(distilled) == wanted > 0 and not any(cell.name.startswith("labels") for cell in sweep.cells)
    taught = [cell for cell in sweep.cells if cell.name.startswith("teacher-")]
    assert len(taught) == sum(step["new_trainings"] for step in told["steps"]) > 0
    assert all(cell.config["seed"] > 50 for cell in taught)
    there = {cell.config["teacher"]["checkpoint"] for cell in distilled}
    fresh = {cell.config["run_dir"] for cell in taught}
    old = {f"work/runs/teacher-{name}" for name in ("t1", "t2-training50", "t2-training51", "t3")}
    assert there <= fresh | old and there & fresh
    if init == "fixed":
        starts = {cell.config["student"]["checkpoint"] for cell in distilled}
        assert starts <= {"work/runs/start-s1", "work/runs/start-s2"}
        return
    again = ["--records", records, "--next", "1e18", "--grid", str(tmp_path / "law" / "next.yaml")]
    assert fit_law.main([*again, "--out", str(tmp_path / "again")]) == 0
    assert make_sweep.read_grid(tmp_path / "again" / "next.yaml").out == "work-next2"


def test_a_grid_of_other_records_is_refused(tmp_path: Path, capsys: Any) -> None:
    records, path, grid = sweep_of(tmp_path, "random")
    for change, message in (
        ({"students": {"s9": {"model": shape(32)}}}, "no student of"),
        ({"rows": []}, "rows: missing or empty"),
    ):
        Path(path).write_text(yaml.safe_dump(grid | change))
        assert fit_law.main(["--records", records, "--next", "1e18", "--grid", path, "--out", str(tmp_path / "o")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit):
        fit_law.main(["--records", records, "--grid", path, "--out", str(tmp_path / "o")])
