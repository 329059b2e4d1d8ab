"""Kills, signals and damaged files in a row: the run goes on each time and ends as if nothing had been."""

from pathlib import Path

import pytest

from tests.support import faults, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

SEED, COUNT = 8, 4


@pytest.mark.slow("a run is killed and damaged several times")
def test_a_run_under_faults_ends_as_if_nothing_had_been(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """A seed that draws a signal, a kill and damage, three of them in saves; benchmarks/faults.py goes on to fifty."""
    wanted = faults.schedule(SEED, COUNT)
    print(*wanted, sep="\n")
    met = faults.endure(faults.config(fixtures, tmp_path / "broken", COUNT), wanted, tmp_path / "output")
    assert sum(met[kind] for kind in faults.KINDS) == COUNT and met["SIGKILL"] and met["flip"]
    unbroken = runs.train(pool, "adapt", faults.config(fixtures, tmp_path / "unbroken", COUNT), faults.WORLD)
    assert runs.metrics(tmp_path / "broken") == runs.metrics(unbroken)
