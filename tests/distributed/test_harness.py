"""lm-evaluation-harness: our sharded model against its own Hugging Face backend on the exported folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import tasks as local_tasks
from tests.support.pool import RankResult, WorkerPool
from tests.support.processes import ROOT
from tests.support.runs import Fixtures
from tools import convert_hf, evaluate_tasks

TENSOR, PIPELINE = ["--tensor", "2"], ["--pipeline", "2"]
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, TENSOR),
    "tp2_sp": (2, [*TENSOR, "--sequence"]),
    "tp2_pp2": (4, [*TENSOR, *PIPELINE]),
    "tp2_sp_pp2": (4, [*TENSOR, *PIPELINE, "--sequence"]),
    "pp2_dp2": (4, PIPELINE),
}
TOLERANCE = 1e-3


def evaluate(pool: WorkerPool, *words: object, world: int = 1) -> list[RankResult]:
    arguments = ["--device", "cpu", *map(str, words)]
    return pool.run(evaluate_tasks.main, arguments, world=world, initialise=False, capture=True)


def answers(results: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """Every request's answer, by task and document."""
    return {(task, row["doc_id"]): row for task, rows in results["samples"].items() for row in rows}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return local_tasks.write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def expected(
    pool: WorkerPool, teacher: Path, tasks: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Any]:
    """What the harness's own backend says of the exported model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    hf = tmp_path_factory.mktemp("exported") / "hf"
    words = ["export", "--checkpoint", str(teacher), "--out", str(hf)]
    assert pool.run(convert_hf.main, words, world=1, initialise=False, capture=True)[0].value == 0
    model = HFLM(pretrained=str(hf), device="cpu", dtype="float32", batch_size=3)
    return answers(simple_evaluate(model, tasks=list(tasks.values())))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_request_equals_the_hugging_face_backend(
    pool: WorkerPool,
    teacher: Path,
    tasks: dict[str, str],
    expected: dict[tuple[str, int], Any],
    tmp_path: Path,
    layout: str,
) -> None:
    world, words = LAYOUTS[layout]
    out = tmp_path / "results.json"
    ranks = evaluate(
        pool, "--checkpoint", teacher, "--tasks", *tasks.values(), "--out", out, "--log-samples", "--truncate",
        "--micro-batch", 3, *words, world=world,
    )  # fmt: skip
    assert [rank.value for rank in ranks] == [0] * world, ranks
    assert "local_choice" in ranks[0].stdout and not any(rank.stdout for rank in ranks[1:])
    found = answers(json.loads(out.read_text()))
    assert found.keys() == expected.keys() and len(found) == 23 + 6 + 8
    greedy = set()
    for key, row in expected.items():
        mine = found[key]["filtered_resps"]
        if key[0] == "local_generate":
            assert mine == row["filtered_resps"], key
            continue
        if key[0] == "local_rolling":
            assert mine == pytest.approx(row["filtered_resps"], abs=TOLERANCE), key
            continue
        assert [log_p for log_p, _ in mine] == pytest.approx([x[0] for x in row["filtered_resps"]], abs=TOLERANCE), key
        assert [said for _, said in mine] == [x[1] for x in row["filtered_resps"]], key
        assert found[key]["acc"] == row["acc"], key
        greedy |= {said for _, said in mine}
    assert greedy == {True, False}, "the model must say some of the choices itself, and others not"


def test_bad_input_is_one_line(
    pool: WorkerPool, teacher: Path, tasks: dict[str, str], fixtures: Fixtures, tmp_path: Path
) -> None:
    lost = tmp_path / "lost.yaml"
    text = Path(tasks["choice"]).read_text().replace("choice.jsonl", "nowhere.jsonl")
    lost.write_text(text)
    cases = [
        (["--tasks", "no_such_task"], "--tasks: no_such_task: no such task"),
        (["--tasks", tmp_path / "none.yaml"], "none.yaml: no such file"),
        (["--tasks", lost], "nowhere.jsonl"),
        (["--tasks", tasks["choice"]], "--truncate"),
        (["--tasks", tasks["rolling"], "--limit", 0], "--limit: 0 given"),
        (["--tasks", tasks["rolling"], "--out", tmp_path / "no" / "x.json"], "no such folder"),
        (["--tasks", tasks["rolling"], "--checkpoint", tmp_path / "none"], "no such checkpoint"),
    ]
    for words, message in cases:
        ranks = evaluate(pool, "--checkpoint", teacher, *TENSOR, *words, world=2)
        assert [rank.value for rank in ranks] == [2, 2], (words, ranks)
        lines = [line for line in ranks[0].stderr.splitlines() if line.startswith("evaluate_tasks: error: ")]
        assert len(lines) == 1 and message in lines[0], (words, ranks[0].stderr)
        assert "Traceback" not in ranks[0].stderr and not ranks[1].stdout


def test_the_tasks_of_minima_s_table_are_known() -> None:
    from lm_eval.tasks import TaskManager

    group = yaml.safe_load((ROOT / "examples" / "evaluation" / "minima.yaml").read_text())
    names = [part if isinstance(part, str) else part.get("task", part.get("group")) for part in group["task"]]
    assert len(names) == 6
    assert set(names) <= set(TaskManager().all_tasks)


JUDGE = """
import os

if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
    raise ValueError("to run code, set HF_ALLOW_CODE_EVAL to 1")


def passes(references, predictions):
    return 0.25
"""


def test_code_that_the_model_writes_is_run_only_where_that_is_allowed(
    pool: WorkerPool, teacher: Path, tasks: dict[str, str], tmp_path: Path
) -> None:
    """A task that asks as HumanEval does: when it is loaded."""
    (tmp_path / "judge.py").write_text(JUDGE)
    task = yaml.safe_load(Path(tasks["generate"]).read_text())
    del task["metric_list"]
    metric = "metric_list: [{metric: !function judge.passes, aggregation: mean, higher_is_better: true}]\n"
    file, out = tmp_path / "code.yaml", tmp_path / "results.json"
    file.write_text(yaml.safe_dump({**task, "unsafe_code": True}) + metric)
    words = ["--checkpoint", teacher, "--tasks", file, "--out", out, "--truncate"]
    (rank,) = evaluate(pool, *words)
    assert rank.value == 2
    assert "runs code that the model writes; allow it with --run-code" in rank.stderr.splitlines()[-1]
    (rank,) = evaluate(pool, *words, "--run-code")
    assert rank.value == 0, rank.stderr
    assert 0.25 in json.loads(out.read_text())["results"]["local_generate"].values()
