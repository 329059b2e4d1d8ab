"""A run that was stopped and goes on, as before or on fewer ranks: every sample once, and the same state to the bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.cli import main
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures
from tests.support.state import state_of

GLOBAL_BATCH = 8


def watched(words: list[str]) -> tuple[dict[int, list[int]], list[bytes]]:
    """Runs a command on a rank; returns the samples that it read in each step, and its state in the end."""
    from megatron_capgap.training import loop

    read, report = loop.read_global_batch, loop._log_step
    samples: dict[int, list[int]] = {}
    last: list[list[bytes]] = [[]]

    def read_and_note(run: loop.TrainingRun, done: int, *rest: Any) -> Any:
        batches = read(run, done, *rest)
        samples[done + 1] = [number for batch in batches for number in batch.sample_ids]
        return batches

    def report_and_note(run: loop.TrainingRun, *rest: Any) -> None:
        last[0] = state_of(run)
        report(run, *rest)

    loop.read_global_batch, loop._log_step = read_and_note, report_and_note
    try:
        assert main(words) == 0
        return samples, last[0]
    finally:
        loop.read_global_batch, loop._log_step = read, report


def watch(pool: WorkerPool, stage: str, config: dict[str, Any], world: int) -> Any:
    """Samples by step and rank, and states by rank."""
    words = [stage, "--config", runs.write_config(config)]
    ranks = pool.run(partial(watched, words), world=world, initialise=False, capture=True)
    steps = sorted(ranks[0].value[0])
    return {step: [rank.value[0][step] for rank in ranks] for step in steps}, [rank.value[1] for rank in ranks]


def test_from_four_replicas_to_two_to_one_no_sample_is_lost_or_repeated(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path
) -> None:
    seen: dict[int, list[int]] = {}
    for world, steps in ((4, 3), (2, 6), (1, 9)):
        changes = {"train__steps": steps, "optimizer__schedule": "constant", "data__valid": None}
        samples, _ = watch(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "run", **changes), world)
        assert sorted(samples) == list(range(steps - 2, steps + 1)), "each goes on where the one before has ended"
        seen |= {step: sorted(number for rank in of_ranks for number in rank) for step, of_ranks in samples.items()}
    assert seen == {step: list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)) for step in range(1, 10)}
    unbroken = {"train__steps": 9, "optimizer__schedule": "constant", "data__valid": None}
    expected = runs.metrics(runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "one", **unbroken)))
    for found, wanted in zip(runs.metrics(tmp_path / "run"), expected, strict=True):
        runs.assert_close(found, wanted, 1e-5)


@pytest.mark.slow("four ranks distill twice")
def test_a_resumed_distillation_has_the_same_state_to_the_bit(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """Tensor 2 x pipeline 2 with dropout: weights, both moments, losses, and the samples of every batch."""
    changes = {"train__steps": 6, "train__dropout": 0.1, "checkpoint__every": 3}
    changes |= {"student__layout": {"tensor": 2, "pipeline": 2}}
    whole = runs.distill_config(fixtures, tmp_path / "whole", teacher, **changes)
    samples, states = watch(pool, "distill", whole, 4)
    resumed = runs.changed(whole, run_dir=str(runs.rewind(tmp_path / "whole", tmp_path / "resumed", step=3)))
    again, states_again = watch(pool, "distill", resumed, 4)
    assert again == {step: samples[step] for step in (4, 5, 6)}
    assert states_again == states and all(states)
    assert runs.metrics(tmp_path / "resumed") == runs.metrics(tmp_path / "whole")
