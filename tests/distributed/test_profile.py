"""What a run leaves of itself: traces of chosen steps and ranks, the log of each rank, times and memory of steps."""

import gzip
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.cli import main
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

RANGES = {
    "teacher forward",
    "hand-off",
    "student step",
    "loss",
    "gradient reduction",
    "optimizer",
    "evaluation",
    "save",
}
CHANGES: dict[str, Any] = {
    "student__layout": {"tensor": 2},
    "train__eval_every": 3,
    "checkpoint__every": 3,
    "checkpoint__async_save": True,
    "profile": {"steps": [2, 3], "ranks": [1]},
    "objective__matching": [{"student_layer": 4, "teacher_layer": 4}],
}


def names_in(trace: Path) -> list[str]:
    """Names of the events of a Chrome trace."""
    with gzip.open(trace) as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_a_run_can_be_seen(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    """Two ranks, whose second one records steps 2 and 3; then the run continues."""
    config = runs.distill_config(fixtures, tmp_path / "run", teacher, **CHANGES)
    ranks = runs.run_stage(pool, "distill", config, 2)
    assert [rank.value for rank in ranks] == [0, 0], ranks
    run_dir = tmp_path / "run"

    (trace,) = (run_dir / "profile").iterdir()
    assert trace.name == "rank_1_steps_2-3.json.gz"
    names = names_in(trace)
    assert RANGES <= set(names)
    assert names.count("student step") == 2 and names.count("evaluation") == 1
    # The evaluation computes losses as well; a range is one of a micro-batch of training.
    assert names.count("loss") == 2 * 4

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line["tokens"] / line["step_seconds"] == pytest.approx(line["tokens_per_second"], rel=1e-3)
        assert line["peak_memory_bytes"] > 50 * 2**20
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    peaks = [line["peak_memory_bytes"] for line in steps]
    assert peaks == sorted(peaks)

    console = ranks[0].stdout
    first = steps[0]
    parts = f"cross-entropy {first['cross_entropy']:.4f}  divergence {first['divergence']:.4f}  matching "
    assert f"step 1/4  loss {first['loss']:.4f}  {parts}{first['matching']:.4f}  norm " in console
    assert re.findall(r"^step (\d): checkpoint saved in \d+\.\d s$", console, re.M) == ["3", "4"]

    again = runs.run_stage(pool, "distill", runs.changed(config, train__steps=5), 2)
    assert [rank.value for rank in again] == [0, 0], again
    assert [file.name for file in (run_dir / "profile").iterdir()] == [trace.name], "its steps are done"
    for rank in (0, 1):
        text = (run_dir / "logs" / f"rank_{rank}.log").read_text()
        assert re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d info: step (\d)/\d  loss ", text, re.M) == list("12345")
        assert "resumed from" in text and "student: " in text
    assert str(trace) in (run_dir / "logs" / "rank_1.log").read_text()
    assert sorted(file.name for file in (run_dir / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]


def fail_at(step: int, words: list[str]) -> int:
    """Runs a command whose second rank fails in a step of its own."""
    import torch.distributed as dist

    from megatron_capgap.training import loop

    work = loop.student_step

    def work_or_fail(run: loop.TrainingRun, done: int, *rest: Any) -> Any:
        if done + 1 == step and dist.get_rank() == 1:
            raise ValueError("a fault of this rank")
        return work(run, done, *rest)

    loop.student_step = work_or_fail
    try:
        return main(words)
    finally:
        loop.student_step = work


def test_an_error_is_in_the_log_of_its_rank(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """A fault with its traceback, and an error of the user in one line; nothing is logged of a refused run."""
    from tests.support.pool import WorkerError

    config = runs.adapt_config(fixtures, tmp_path / "run", data__valid=None, runtime__timeout_seconds=20)
    words = ["adapt", "--config", runs.write_config(config)]
    with pytest.raises(WorkerError):
        pool.run(partial(fail_at, 3, words), world=2, initialise=False, capture=True)
    text = (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    assert " error: Traceback (most recent call last):\n" in text
    assert text.splitlines()[-1].endswith(" error: ValueError: a fault of this rank")
    assert "info: step 2/4  loss " in text

    other = runs.adapt_config(fixtures, tmp_path / "refused", profile={"steps": [3, 5], "ranks": [0, 2]})
    for rank in runs.run_stage(pool, "adapt", other, 2):
        assert rank.value == 2
    assert not (tmp_path / "refused").exists()
