"""When a run is to end early, and which checkpoint its directory then stands for."""

from pathlib import Path

import pytest

from megatron_capgap.checkpoint import run_directory
from megatron_capgap.checkpoint.metadata import CheckpointCorrupted
from tests.support.pool import WorkerPool


def told(most: int | None, losses: list[float]) -> list[tuple[bool, bool]]:
    """Runs in a worker: (best so far, over) after each evaluation."""
    from megatron_capgap.devices import choose

    choose("cpu", 0)
    from megatron_capgap.training.early_stopping import EarlyStopping

    patience = EarlyStopping(most)
    return [(patience.update(step, loss), patience.exhausted) for step, loss in enumerate(losses)]


def test_patience(pool: WorkerPool) -> None:
    losses = [3.0, 2.0, 2.0, 1.5, 1.6, 1.7, 1.8]
    best, worse, over = (True, False), (False, False), (False, True)
    assert pool.run(told, 3, losses, world=1)[0] == [best, best, worse, best, worse, worse, over]
    assert pool.run(told, None, losses, world=1)[0] == [worse] * 7


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    (tmp_path / "latest").write_text("step_6\n")
    return tmp_path


def test_a_run_directory_stands_for_its_best_checkpoint(run_dir: Path) -> None:
    assert run_directory.locate(str(run_dir)).name == "step_6"
    run_directory.set_best(run_dir, 2)
    assert run_directory.locate(str(run_dir)).name == "step_2"
    assert run_directory.latest(run_dir).name == "step_6", "what a run goes on from"
    run_directory.set_best(run_dir, 5)
    assert run_directory.locate(str(run_dir)).name == "step_2", "a checkpoint that could not be written is not named"
    run_directory.set_best(run_dir, None)
    assert run_directory.locate(str(run_dir)).name == "step_6"


def test_the_best_one_stays_among_the_newest(run_dir: Path) -> None:
    run_directory.set_best(run_dir, 2)
    (run_dir / "staged").mkdir()
    run_directory.publish(run_dir / "staged", run_dir, 8, keep=1)
    assert run_directory.steps_in(run_dir) == [2, 8]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"step_3\n", r"names 'step_3', which is not a complete checkpoint \(existing: step_2, step_4"),
        (b"step_2", "names 'step_2', which is not a complete checkpoint"),
        (b"", "names '', which is not a complete checkpoint"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=["gone", "cut", "empty", "no text"],
)
def test_a_best_that_is_gone_or_damaged_is_said(run_dir: Path, content: bytes, says: str) -> None:
    (run_dir / "best").write_bytes(content)
    with pytest.raises(CheckpointCorrupted, match=f"best: {says}"):
        run_directory.locate(str(run_dir))
