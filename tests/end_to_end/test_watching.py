"""What a run says of itself while it goes: the rank that the others wait for, the time that reading takes, the peak."""

import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_capgap.__main__ import main
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Material

SECONDS = 0.4


def slow(part: str, rank: int, words: list[str]) -> int:
    """Runs a command in which one rank reads slowly, or is slow in its forward passes."""
    from megatron_capgap.training import loop, step

    module, name = {"reading": (loop, "batches_of"), "forward": (step.schedule, "run")}[part]
    work = getattr(module, name)

    def slowly(*arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == rank:
            time.sleep(SECONDS)
        return work(*arguments, **options)

    setattr(module, name, slowly)
    try:
        return main(words)
    finally:
        setattr(module, name, work)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("part", ["reading", "forward"])
def test_the_slow_rank_is_named(pool: WorkerPool, material: Material, tmp_path: Path, part: str, rank: int) -> None:
    """Two replicas; one is late at the reduction of gradients, by its data or by itself."""
    changes = {"train__log_every": 3, "train__steps": 4, "data__valid": None}
    config = runs.adapt_config(material, tmp_path / "run", **changes)
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


def test_the_share_of_the_peak(pool: WorkerPool, material: Material, tmp_path: Path) -> None:
    """One rank: it has none to wait for, and its peak is the only one."""
    config = runs.adapt_config(material, tmp_path / "run", runtime__peak_tflops=1.0e-3)
    (rank,) = runs.run_stage(pool, "adapt", config)
    assert rank.value == 0 and "slowest" not in rank.stdout
    lines = re.findall(r"([\d.]+) ([kMG])FLOP/s \(([\d.]+)% of the peak\)", rank.stdout)
    assert len(lines) == 4
    for speed, unit, share in lines:
        assert float(share) == pytest.approx(float(speed) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit] / 1e9 * 100, rel=0.02)
