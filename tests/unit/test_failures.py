"""What a failed test says of the processes that it started."""

import os
import signal
from pathlib import Path

import pytest

from tests.support import failures, runs
from tests.support.processes import ROOT, job
from tests.support.runs import Fixtures

OUTER = """
def test_that_fails(tmp_path):
    from tests.support.failures import on_failure
    on_failure("rank 7", lambda: "its last words")
    on_failure("rank 8", lambda: 1 / 0)
    assert False

def test_that_fails_too():
    assert False
"""


def test_it_prints_what_was_registered_once(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the tests are no installed package
    (pytester.mkdir("unit") / "test_outer.py").write_text(OUTER)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    done = pytester.runpytest_subprocess()
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(["*- rank 7 -*", "its last words", "*- rank 8 -*", "ZeroDivisionError: *"])
    assert done.outlines.count("its last words") == 1


def test_a_job_that_hangs_tells_its_seed_and_every_rank_s_stacks(fixtures: Fixtures, tmp_path: Path) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "run", train__steps=10**6, data__valid=None, seed=77)
    words = ["adapt", "--config", runs.write_config(config)]
    with (
        pytest.raises(AssertionError, match=r"ranks \[0, 1\] have not ended after 0\.5 s"),
        job(words, 2, tmp_path / "job") as ranks,
    ):
        ranks.wait_until(lambda: len(runs.steps_of(tmp_path / "run")) >= 1)
        ranks.signal(signal.SIGCONT)  # and does nothing
        ranks.wait(0.5)
    said = dict(failures.told())["2 ranks of capgap adapt"]
    assert "seed: 77" in said and f"--config {words[2]}" in said and "step 1/1000000" in said
    for rank in range(2):
        (stacks,) = [part for part in said.split("---- ") if part.startswith(f"rank {rank} stderr")]
        assert f"rank {rank}: exit code {-signal.SIGABRT}" in said
        assert "Current thread" in stacks and "megatron_capgap/training/loop.py" in stacks, stacks


def test_a_rank_that_is_stopped_is_killed(fixtures: Fixtures, tmp_path: Path) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "run", train__steps=10**6, data__valid=None)
    with pytest.raises(ZeroDivisionError), job(["adapt", "--config", runs.write_config(config)], 1, tmp_path) as ranks:
        os.kill(ranks.ranks[0].pid, signal.SIGSTOP)
        raise ZeroDivisionError
    assert ranks.ranks[0].returncode < 0
