"""The grid: which runs it means, in which order, and what is refused."""

from typing import Any

import pytest

from megatron_capgap.law.records import LawError
from megatron_capgap.law.sweep import expand

MODEL = {"layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "vocab": 100}


def grid(**changes: Any) -> dict[str, Any]:
    found = {
        "out": "work",
        "common": {"device": "cpu", "train": {"micro_batch": 2}, "optimizer": {"lr": 1e-3}},
        "teach": {"train": {"steps": 9}},
        "start": {"train": {"steps": 3}},
        "distill": {"train": {"steps": 5}},
        "teachers": {"t1": {"model": MODEL, "optimizer": {"lr": 2e-3}}, "t2": {"checkpoint": "runs/there"}},
        "students": {"s1": {"model": MODEL}, "s2": {"model": MODEL, "checkpoint": "runs/begun"}},
        "rows": [
            {"init": "random", "seeds": [1, 2], "labels": False},
            {"init": "fixed", "seeds": [1], "teachers": ["t1"], "labels": False},
        ],
    }
    return found | changes


def test_a_grid_becomes_runs() -> None:
    sweep = expand(grid())
    cells = {cell.name: cell for cell in sweep.cells}
    assert len(cells) == 1 + 8 + 1 + 2
    assert cells["teacher-t1"].config == {
        "run_dir": "work/runs/teacher-t1",
        "device": "cpu",
        "train": {"micro_batch": 2, "steps": 9},
        "optimizer": {"lr": 2e-3},
        "student": {"model": MODEL},
    }
    taught = cells["random-s1-t1-seed2"]
    assert taught.after == ("teacher-t1",) and taught.stage == "distill"
    assert taught.config["teacher"] == {"checkpoint": "work/runs/teacher-t1"} and taught.config["seed"] == 2
    assert taught.config["train"] == {"micro_batch": 2, "steps": 5} and taught.config["optimizer"] == {"lr": 1e-3}
    assert cells["random-s1-t2-seed1"].config["teacher"] == {"checkpoint": "runs/there"}
    assert cells["random-s1-t2-seed1"].after == ()
    made, given = cells["fixed-s1-t1-seed1"], cells["fixed-s2-t1-seed1"]
    assert made.config["student"] == {"checkpoint": "work/runs/start-s1"}
    assert made.after == ("teacher-t1", "start-s1") and cells["start-s1"].config["train"]["steps"] == 3
    assert given.config["student"] == {"checkpoint": "runs/begun"} and given.after == ("teacher-t1",)


def test_every_run_stands_behind_those_that_it_needs() -> None:
    sweep = expand(grid())
    seen: set[str] = set()
    for cell in sweep.cells:
        assert set(cell.after) <= seen
        seen.add(cell.name)
    phases = [{cell.name for cell in cells} for cells in sweep.phases()]
    assert phases[0] == {"teacher-t1", "start-s1"} | {f"random-s{s}-t2-seed{n}" for s in (1, 2) for n in (1, 2)}
    assert len(phases) == 2 and len(phases[1]) == 4 + 2


def test_pruned_students_are_cut_once_a_teacher() -> None:
    row = {"init": "pruned", "students": ["s1"], "teachers": ["t1"], "seeds": [1, 2], "labels": False}
    sweep = expand(grid(rows=[row], prune={"prune": {"batches": 4}}))
    cells = {cell.name: cell for cell in sweep.cells}
    cut = cells["prune-s1-t1"]
    assert len(cells) == 1 + 1 + 2 and cut.stage == "prune" and cut.after == ("teacher-t1",)
    assert cut.config["prune"] == {"batches": 4, "layers": 2, "hidden": 16, "heads": 2, "ffn": 32}
    assert cut.config["teacher"] == {"checkpoint": "work/runs/teacher-t1"} and "student" not in cut.config
    assert cells["pruned-s1-t1-seed2"].config["student"] == {"checkpoint": "work/runs/prune-s1-t1"}
    assert cells["pruned-s1-t1-seed2"].after == ("teacher-t1", "prune-s1-t1")
    assert [len(cells) for cells in sweep.phases()] == [1, 1, 2]


def test_the_grid_itself_is_left_alone() -> None:
    given, copy = grid(), grid()
    expand(given)
    assert given == copy


BAD = [
    ({"oute": "x"}, "oute: unknown key of a grid"),
    ({"out": ""}, "out: missing or empty"),
    ({"rows": {}}, "rows: '{}' given; expected a list"),
    ({"teachers": {"t1": {}}}, "teachers.t1: a model or a checkpoint is missing"),
    ({"students": {"s1": {"checkpoint": "x"}}}, "students.s1: a model is missing"),
    (
        {"rows": [{"init": "warm", "seeds": [1]}]},
        r"rows\[0\].init: 'warm' given; valid values: random, fixed, pruned, pruned_other",
    ),
    ({"rows": [{"init": "random", "seeds": []}]}, r"rows\[0\].seeds: \[\] given"),
    ({"rows": [{"init": "random", "seeds": [1], "students": ["s9"]}]}, r"rows\[0\].students: 's9' is unknown; valid"),
    ({"rows": [{"init": "random", "seed": 1}]}, r"rows\[0\]: .* keys: init, labels, seeds, students, teachers"),
    ({"rows": [{"init": "random", "seeds": [1]}] * 2}, r"rows\[1\]: random-s1-t1-seed1 is in an earlier row"),
    ({"rows": [{"init": "pruned_other", "seeds": [1]}]}, r"rows\[0\]: init pruned_other needs a second training of t1"),
    ({"rows": [{"init": "random", "seeds": [1], "labels": "no"}]}, r"rows\[0\].labels: 'no' given; valid values: true"),
    ({"teachers": {"t1": {"checkpoint": "x", "seeds": [1]}}}, r"teachers.t1.seeds: a checkpoint is one training"),
    (
        {"teachers": {"t1": {"model": MODEL, "seeds": [0.5]}}},
        r"teachers.t1.seeds: \[0.5\] given; expected a list of whole numbers",
    ),
    (
        {
            "students": {"s1": {"model": MODEL, "checkpoint": "work/runs/prune-s1-t1"}},
            "teachers": {"t1": {"checkpoint": "work/runs/fixed-s1-t1-seed1"}},
            "rows": [{"init": init, "seeds": [1], "labels": False} for init in ("fixed", "pruned")],
        },
        "a run cannot need itself",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_is_no_grid_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LawError, match=message):
        expand(grid(**changes))
    with pytest.raises(LawError, match="has none of them"):
        expand(["a"])


def test_starts_are_trained_on_labels_alone_as_well() -> None:
    rows = [{"init": init, "students": ["s1"], "seeds": [1, 2]} for init in ("random", "fixed", "pruned")]
    cells = {cell.name: cell for cell in expand(grid(rows=rows)).cells}
    alone = {name for name in cells if name.startswith("labels-")}
    assert alone == {
        *(f"labels-{init}-s1-seed{seed}" for init in ("random", "fixed") for seed in (1, 2)),
        *(f"labels-pruned-s1-{teacher}-seed{seed}" for teacher in ("t1", "t2") for seed in (1, 2)),
    }
    one, taught = cells["labels-pruned-s1-t2-seed1"], cells["pruned-s1-t2-seed1"]
    assert one.stage == "distill" and one.after == taught.after == ("prune-s1-t2",)
    assert one.config["objective"] == {"divergence_weight": 0.0, "cross_entropy_weight": 1.0, "matching": []}
    without = {key: value for key, value in one.config.items() if key not in ("objective", "run_dir")}
    assert without == {key: value for key, value in taught.config.items() if key != "run_dir"}


def test_trainings_of_one_teacher_are_teachers_of_their_own() -> None:
    teachers = {"t1": {"model": MODEL, "seeds": [3, 4, 5], "train": {"steps": 8}}, "t2": {"checkpoint": "runs/there"}}
    rows = [
        {"init": "pruned", "students": ["s1"], "teachers": ["t1"], "seeds": [1]},
        {"init": "pruned_other", "students": ["s1"], "teachers": ["t1"], "seeds": [1]},
    ]
    cells = {cell.name: cell for cell in expand(grid(rows=rows, teachers=teachers)).cells}
    for seed in (3, 4, 5):
        made = cells[f"teacher-t1-training{seed}"].config
        assert made["seed"] == seed and made["train"]["steps"] == 8 and made["student"] == {"model": MODEL}
        assert cells[f"pruned-s1-t1-training{seed}-seed1"].config["teacher"]["checkpoint"] == made["run_dir"]
    crossed = cells["pruned_other-s1-t1-training5-seed1"]
    assert crossed.config["student"] == {"checkpoint": "work/runs/prune-s1-t1-training3"}
    assert crossed.config["teacher"] == {"checkpoint": "work/runs/teacher-t1-training5"}
    assert crossed.after == ("teacher-t1-training5", "prune-s1-t1-training3")
    alone = [name for name in cells if name.startswith("labels-")]  # a start has one, whoever else teaches it
    assert sorted(alone) == [f"labels-pruned-s1-t1-training{seed}-seed1" for seed in (3, 4, 5)]
    assert len(cells) == 3 + 3 + 3 + 3 + 3


def test_a_student_s_checkpoint_may_be_a_run_of_the_grid() -> None:
    students = {
        "s1": {"model": MODEL},
        "s2": {"model": MODEL, "checkpoint": "work/runs/prune-s1-t1/checkpoints/step_0"},
    }
    rows = [
        {"init": "fixed", "students": ["s2"], "teachers": ["t2"], "seeds": [1], "labels": False},
        {"init": "pruned", "students": ["s1"], "teachers": ["t1"], "seeds": [1], "labels": False},
    ]
    sweep = expand(grid(rows=rows, students=students))
    names = [cell.name for cell in sweep.cells]
    cells = dict(zip(names, sweep.cells, strict=True))
    assert cells["fixed-s2-t2-seed1"].after == ("prune-s1-t1",)
    assert names.index("prune-s1-t1") < names.index("fixed-s2-t2-seed1")
    assert [{cell.name for cell in phase} for phase in sweep.phases()] == [
        {"teacher-t1"},
        {"prune-s1-t1"},
        {"fixed-s2-t2-seed1", "pruned-s1-t1-seed1"},
    ]
