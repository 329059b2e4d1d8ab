"""`capgap launch`: ranks on this node, errors of one line, signals that reach the ranks."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_capgap.cli import main
from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed import launch
from tests.support import runs
from tests.support.processes import environment
from tests.support.runs import Fixtures

TP2 = {"tensor": 2, "sequence": True}


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_capgap", "launch", *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def configuration(fixtures: Fixtures, tmp_path: Path, **changes: Any) -> str:
    config = runs.adapt_config(fixtures, tmp_path / "run", student__layout=TP2, **changes)
    return runs.write_config(config, tmp_path / "adapt.yaml")


def test_two_ranks_and_a_mistake_of_one_line(fixtures: Fixtures, tmp_path: Path) -> None:
    file = configuration(fixtures, tmp_path, train__steps=2)
    _, errors = (process := started(tmp_path, "-n", "2", "adapt", "--config", file)).communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    assert len(runs.steps_of(tmp_path / "run")) == 2
    _, errors = (process := started(tmp_path, "-n", "3", "adapt", "--config", file)).communicate(timeout=300)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert line.startswith(f"capgap: error: {file}:") and "does not divide the world size 3" in line


def test_a_signal_reaches_the_ranks_which_save(fixtures: Fixtures, tmp_path: Path) -> None:
    file = configuration(fixtures, tmp_path, train__steps=100000, train__log_every=1)
    process = started(tmp_path, "-n", "2", "adapt", "--config", file)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step 3/"))
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, ""), output
    steps = runs.steps_of(tmp_path / "run")
    assert (tmp_path / "run/latest").read_text() == f"step_{steps[-1]['step']}\n"


def test_a_killed_rank_is_named(fixtures: Fixtures, tmp_path: Path) -> None:
    file = configuration(fixtures, tmp_path, train__steps=100000, train__log_every=1)
    process = started(tmp_path, "-n", "2", "adapt", "--config", file)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step 2/"))
    second = next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1")
    second.kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.splitlines()[-1] == f"capgap: error: rank 1 (process {second.pid}) was killed by SIGKILL"


def test_the_words_are_told_apart() -> None:
    assert launch.split(["-n", "2", "distill", "--config", "a"]) == (["-n", "2"], ["distill", "--config", "a"])
    assert launch.ranks_and_options(["--nnodes=2", "-n", "4", "--node-rank", "1"]) == (
        4,
        ["--nnodes=2", "--node-rank", "1"],
    )
    assert launch.ranks_and_options(["--nproc-per-node=3"]) == (3, [])


@pytest.mark.parametrize("words", [["-n", "x"], ["-n", "0"], ["-n"]])
def test_a_number_of_ranks_that_is_none(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"launch: -n .*expected an integer > 0"):
        launch.ranks_and_options(words)


def test_a_launch_without_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "-n", "2"]) == 2
    assert "launch: no stage given; valid values: adapt, prune" in capsys.readouterr().err
    assert main(["launch", "--help"]) == 0
    assert "usage: capgap launch" in capsys.readouterr().out
