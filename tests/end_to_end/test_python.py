"""The stages as Python functions, and the notebook that uses them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap import UserError, adapt, distill, evaluate, prune
from megatron_capgap.config.loader import load
from tests.support import runs
from tests.support.processes import ROOT, environment
from tests.support.runs import Fixtures

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def test_the_stages_follow_each_other_in_one_process(fixtures: Fixtures, tmp_path: Path) -> None:
    teacher = adapt(runs.adapt_config(fixtures, tmp_path / "teacher"), train={"steps": 3})
    assert len(teacher.losses) == 3 and teacher.checkpoint == tmp_path / "teacher/checkpoints/step_3"
    data = {name: fixtures.data[name] for name in ("tokenizer", "train", "sequence_length")}
    student = prune(
        {"run_dir": tmp_path / "student", "device": "cpu", "data": data},
        teacher={"checkpoint": teacher.run_dir},
        prune={"layers": 2, "ffn": 32, "batches": 1},
        train={"global_batch": 2},
    )
    config = runs.distill_config(fixtures, tmp_path / "distilled", teacher.run_dir)
    config["student"] = {"checkpoint": str(student.run_dir)}
    taught = distill(config)
    assert {"divergence", "cross_entropy"} <= taught.metrics[0].keys()
    found = evaluate(
        {"run_dir": tmp_path / "e", "device": "cpu", "data": {**data, "train": [], "valid": fixtures.data["valid"]}},
        student={"checkpoint": taught.run_dir},
    )
    assert found.evaluation is not None and found.evaluation["valid_perplexity"] > 1
    assert found.losses == [] and found.checkpoint is None and taught.evaluation is None


def test_a_file_a_mapping_and_an_object_are_the_same_run(fixtures: Fixtures, tmp_path: Path) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "one", train__steps=2)
    one = adapt(config)
    resolved = tmp_path / "one/resolved.yaml"
    two = adapt(load(str(resolved), (), "adapt").config, run_dir=tmp_path / "two")
    three = adapt(resolved, run_dir=str(tmp_path / "three"))
    assert one.losses == two.losses == three.losses


@pytest.mark.parametrize(
    "changes, overrides, expected",
    [
        ({"trian": {"steps": 3}}, {}, "the configuration: trian: unknown key; did you mean train?"),
        ({}, {"train": {"stps": 3}}, "--train.stps: unknown key; did you mean train.steps?"),
        ({"seed": object()}, {}, "the configuration: cannot be written as YAML"),
        ({"seed": "x"}, {}, 'the configuration: seed: "x" given; expected'),
        ({"data": {}}, {}, "the configuration: data.tokenizer: missing"),
    ],
)
def test_mistakes_are_user_errors(
    fixtures: Fixtures, tmp_path: Path, changes: dict[str, Any], overrides: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        adapt({**runs.adapt_config(fixtures, tmp_path / "run"), **changes}, **overrides)
    assert str(caught.value).startswith(expected)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the configuration"):
        adapt(tmp_path / "nothing.yaml")


@pytest.mark.slow("downloads text and trains a tokenizer and three models")
def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    few = source.replace("teacher_steps, student_steps = 300, 60", "teacher_steps, student_steps = 4, 4")
    few = few.replace('"--out", work)', '"--out", work, "--megabytes", 1)').replace('"log_every": 5', '"log_every": 1')
    assert few.count("4, 4") == 1 and few.count("--megabytes") == 1
    for name in ("tools", "examples", "megatron_capgap"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebook.py").write_text(few)
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env={**environment(), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/notebook/losses.png").stat().st_size > 5000
    assert [line.split()[0] for line in done.stdout.splitlines() if " perplexity " in line and "token" not in line] == [
        "teacher",
        "taught",
        "alone",
    ]
