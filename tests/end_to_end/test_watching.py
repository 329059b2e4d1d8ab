"""What a run says of itself while it goes: the rank that the others wait for, the time that reading takes, the peak."""

import re
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_capgap.cli import main
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import LEAVE, job
from tests.support.runs import Fixtures

SECONDS = 0.4


def slow(part: str, rank: int, words: list[str]) -> int:
    """Runs a command in which one rank reads slowly, or is slow in its forward passes."""
    from megatron_capgap.training import loop, step

    module, name = {"reading": (loop, "micro_batches"), "forward": (step.pipeline_schedule, "run")}[part]
    work = getattr(module, name)

    def slowly(*arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == rank:
            time.sleep(SECONDS)
        elif part == "forward":  # else the moment that a busy machine takes from its reading would be half of its way
            time.sleep(SECONDS / 2)
        return work(*arguments, **options)

    setattr(module, name, slowly)
    try:
        return main(words)
    finally:
        setattr(module, name, work)


@pytest.mark.alone
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("part", ["reading", "forward"])
def test_the_slow_rank_is_named(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, part: str, rank: int) -> None:
    """Two replicas; one is late at the reduction of gradients, by its data or by itself."""
    changes = {"train__log_every": 3, "train__steps": 4, "data__valid": None}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    work = partial(slow, part, rank, ["adapt", "--config", runs.write_config(config)])
    ranks = pool.run(work, world=2, initialise=False, capture=True)
    assert [one.value for one in ranks] == [0, 0], ranks
    lines = re.findall(
        r"^step (\d+)/4 .* slowest rank (\d) ([\d.]+)x of the fastest  data (\d+)%", ranks[0].stdout, re.M
    )
    assert [int(step) for step, *_ in lines] == [3, 4], ranks[0].stdout
    for _, slowest, times, data in lines:
        assert int(slowest) == rank and float(times) > 1.1
        assert (int(data) > 40) == (part == "reading")


def test_the_share_of_the_peak(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """One rank: it has none to wait for, and its peak is the only one."""
    config = runs.adapt_config(fixtures, tmp_path / "run", runtime__peak_tflops=1.0e-3)
    (rank,) = runs.run_stage(pool, "adapt", config)
    assert rank.value == 0 and "slowest" not in rank.stdout
    lines = re.findall(r"([\d.]+) ([kMG])FLOP/s \(([\d.]+)% of the peak\)", rank.stdout)
    assert len(lines) == 4
    for speed, unit, share in lines:
        assert float(share) == pytest.approx(float(speed) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit] / 1e9 * 100, rel=0.02)


LOST = {
    "killed": (signal.SIGKILL, 1, "rank 1 on {host}, last heartbeat in step "),
    "stands still": (signal.SIGSTOP, 2, "rank 2 on {host}, last heartbeat in step "),
    "the first stands still": (signal.SIGSTOP, 0, "rank 0, which hosts the job's store, does not respond"),
}


@pytest.mark.slow("waits until the others give a silent rank up")
@pytest.mark.parametrize("name", LOST)
def test_a_lost_rank_is_named_with_what_the_others_waited_in(name: str, fixtures: Fixtures, tmp_path: Path) -> None:
    number, lost, words = LOST[name]
    limit = 20
    changes = {"train__steps": 2000, "data__valid": None, "runtime__timeout_seconds": limit}
    layout = {"student__layout": {"tensor": 2, "pipeline": 2}}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes, **layout)
    with job(["adapt", "--config", runs.write_config(config)], 4, tmp_path / "job") as ranks:
        ranks.wait_until(lambda: len(runs.steps_of(tmp_path / "run")) >= 3)
        ranks.wait_until(lambda: all(place.startswith("step ") for place in ranks.places()), every=0.2)
        began = time.monotonic()
        ranks.signal(number, [lost])
        others = [rank for rank in range(4) if rank != lost]
        codes = ranks.wait_for(others, 5 * limit)
        # A dead rank's connections close; one that stands still is missed after the time-out. Then it is looked for.
        wait = 0 if number == signal.SIGKILL else limit
        assert time.monotonic() - began < wait + limit / 2 + LEAVE, "and the time to leave"
        assert all(code not in (0, None) for code in codes), codes
        lines = [line for rank in others for line in ranks.stderr(rank).splitlines() if "capgap: error" in line]
        assert len(lines) == 3, [ranks.stderr(rank) for rank in others]
        for rank, line in zip(others, lines, strict=True):
            assert f" rank {rank} capgap: error: rank {rank} on {socket.gethostname()} waited in " in line, line
            assert re.search(r" waited in \S.*, called by \w+ \(\w+/\w+.py:\d+\) \(step \d+\): ", line), line
            assert words.format(host=socket.gethostname()) in line, lines
