"""benchmarks/loss.py at a size that takes no time."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import loss as benchmark
from tests.support.pool import WorkerPool

pytestmark = pytest.mark.alone


def run_rank(folder: str) -> None:
    benchmark.worker(int(os.environ["RANK"]), 2, ["tiny"], 1, folder)


def test_our_rows_of_the_table(pool: WorkerPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Peers are measured where they are installed; ours holds the gradients of hidden states and head."""
    pool.run(run_rank, str(tmp_path), world=2, initialise=False)
    size = benchmark.SIZES["tiny"]
    rows = json.loads((tmp_path / "2.json").read_text())["tables"]["tiny"]
    gradients = 4 * size.student * (size.tokens + size.vocab // 2) / benchmark.MB
    for row in rows[:3]:
        assert row["gradient_error"] < 1e-5
        assert gradients <= row["held_mb"] < gradients + 0.001 and row["held_mb"] < row["peak_mb"]
    benchmark.show(size, 2, rows)
    printed = capsys.readouterr().out
    assert all(f"ours, {chunk} tokens at a time: the matrix products take" in printed for chunk in (128, 192, 512))
