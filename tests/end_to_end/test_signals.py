"""Asked to stop, a run saves and leaves; fed nonsense, it stops before the optimizer is touched."""

import hashlib
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_capgap.cli import main
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import job
from tests.support.runs import Fixtures
from tests.support.state import NaNGradient, state_of

LAYOUTS = {"pp2": {"pipeline": 2}, "dp2": {}}


@pytest.mark.slow("a run is stopped, goes on, and is compared with one that never was")
@pytest.mark.parametrize("number, rank", [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_stops_all_at_a_step(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    changes = {"train__steps": 2000, "student__layout": LAYOUTS["pp2"], "data__valid": None}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    run_dir = tmp_path / "run"
    with job(["adapt", "--config", runs.write_config(config)], 2, tmp_path / "job") as ranks:
        ranks.wait_until(lambda: len(runs.steps_of(run_dir)) >= 3)
        ranks.signal(number, [rank])
        assert ranks.wait() == [0, 0], ranks.stderr()
        done = len(runs.steps_of(run_dir))
        assert f"stopped by {number.name} after step {done} of 2000" in ranks.stdout()
        assert ranks.stdout(1) == "" and ranks.stderr(0) == ranks.stderr(1) == ""
        assert ranks.left_behind() == []
    assert 3 <= done < 2000
    assert runs.checkpoints(run_dir) == [f"step_{done}"]
    assert (run_dir / "latest").read_text() == f"step_{done}\n"
    # The cosine schedule of the resumed run is another one, so that only its place is compared here.
    ranks = runs.run_stage(pool, "adapt", runs.changed(config, train__steps=done + 1), world=2)
    assert [rank.value for rank in ranks] == [0, 0], ranks
    assert [entry["step"] for entry in runs.steps_of(run_dir)] == list(range(1, done + 2))


def signal_myself(step: int, number: int, words: list[str], times: int = 1) -> int:
    """Runs a command whose process is signalled at the end of a step, perhaps several times, far enough apart."""
    from megatron_capgap.distributed import signals
    from megatron_capgap.training import loop

    report, after = loop._log_step, signals.SECOND_AFTER_SECONDS

    def report_and_signal(run: loop.TrainingRun, done: int, *rest: Any) -> None:
        report(run, done, *rest)
        if done == step:
            for _ in range(times):
                signal.raise_signal(number)

    loop._log_step = report_and_signal
    signals.SECOND_AFTER_SECONDS = -1.0 if times > 1 else 1e9
    try:
        return main(words)
    finally:
        loop._log_step, signals.SECOND_AFTER_SECONDS = report, after


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_goes_on_to_the_last_digit(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    changes = {"train__steps": 5, "train__dropout": 0.1}
    unbroken = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "unbroken", **changes))
    stopped = runs.adapt_config(fixtures, tmp_path / "stopped", **changes)
    handler = pool.run(signal.getsignal, number, world=1, initialise=False)
    work = partial(signal_myself, 2, number, ["adapt", "--config", runs.write_config(stopped)])
    (rank,) = pool.run(work, world=1, initialise=False, capture=True)
    assert rank.value == code and f"stopped by {number.name} after step 3 of 5" in rank.stdout
    warned = (
        "capgap: interrupted: saves after this step or the next one and ends; a second Ctrl-C ends it without saving"
    )
    assert rank.stderr.splitlines() == ([warned] if code else [])
    assert pool.run(signal.getsignal, number, world=1, initialise=False) == handler
    # The signal comes after the ranks have agreed in step 2, so that they stop after step 3.
    assert [entry["step"] for entry in runs.metrics(tmp_path / "stopped")] == [1, 2, 3]
    assert runs.metrics(runs.train(pool, "adapt", stopped)) == runs.metrics(unbroken)


@pytest.mark.parametrize(
    "step, lost",
    [
        (1, "ends at once, without saving; step 1 is lost, there is no checkpoint yet"),
        (4, "ends at once, without saving; steps 3 to 4 are lost, the next start continues after step 2"),
    ],
)
def test_a_second_interrupt_ends_the_run_and_says_what_is_lost(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, step: int, lost: str
) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "run", train__steps=8, data__valid=None)
    if step > 1:
        runs.train(pool, "adapt", runs.changed(config, train__steps=2))
    words = ["adapt", "--config", runs.write_config(config)]
    (rank,) = pool.run(partial(signal_myself, step, signal.SIGINT, words, 2), world=1, initialise=False, capture=True)
    assert rank.value == 130
    assert rank.stderr.splitlines()[-1] == f"capgap: interrupted again: {lost}"
    assert not (tmp_path / "run" / "in_use.json").exists()
    assert runs.checkpoints(tmp_path / "run") == (["step_2"] if step > 1 else [])


def test_the_end_of_its_time_stops_a_run_as_a_signal_does(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """A run whose time is up at once takes one step a start, saves and ends; it comes to the same end."""
    changes = {"train__steps": 12, "train__dropout": 0.1, "student__layout": LAYOUTS["pp2"]}
    unbroken = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "unbroken", **changes), world=2)
    limited = runs.adapt_config(fixtures, tmp_path / "limited", train__exit_after_minutes=1e-6, **changes)
    for done in range(1, 4):
        ranks = runs.run_stage(pool, "adapt", limited, world=2)
        assert [rank.value for rank in ranks] == [0, 0], ranks
        assert f"stopped by train.exit_after_minutes after step {done} of 12" in ranks[0].stdout
        assert runs.checkpoints(tmp_path / "limited")[-1] == f"step_{done}"
    runs.train(pool, "adapt", runs.changed(limited, train__exit_after_minutes=60), world=2)
    assert runs.metrics(tmp_path / "limited") == runs.metrics(unbroken)


def digest_of(run: Any) -> str:
    """A digest of this rank's weights, Adam's moments and step counters, and the place in the schedule."""
    digest = hashlib.sha256(b"".join(state_of(run)))
    digest.update(str(run.optimizer.lr_scheduler.num_steps).encode())
    return digest.hexdigest()


def run_poisoned(part: str, sample: int, words: list[str]) -> tuple[int, list[str]]:
    """Runs adapt while the loss, or its gradient, of the micro-batch with one sample is NaN.

    Returns:
        The exit code, and a digest of the state before training, after each step and at the end.
    """
    from megatron_capgap.stages import adapt, context
    from megatron_capgap.training import loop

    report, train, loss = loop._log_step, adapt.train, context.language_model_loss
    seen: list[loop.TrainingRun] = []
    digests: list[str] = []
    batches: list[Any] = []

    def report_and_digest(run: loop.TrainingRun, *rest: Any) -> None:
        report(run, *rest)
        digests.append(digest_of(run))

    def remember_and_train(run: loop.TrainingRun) -> None:
        def remember(mine: Any, teacher_states: Any) -> Any:
            batches[:] = mine
            return run.objective.loss_function(mine, teacher_states)

        seen.append(run)
        digests.append(digest_of(run))
        train(replace(run, objective=replace(run.objective, loss_function=remember)))

    def poisoned_loss(
        hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        (batch,) = (batch for batch in batches if torch.equal(batch.flat()[0], labels))
        if sample in batch.sample_ids and part == "gradient":
            hidden = NaNGradient.apply(hidden)
        out = loss(hidden, head, labels, *rest, **options)
        if sample in batch.sample_ids and part == "loss":
            out.loss_sum.mul_(float("nan"))
        return out

    loop._log_step, adapt.train, context.language_model_loss = report_and_digest, remember_and_train, poisoned_loss
    try:
        code = main(words)
    finally:
        loop._log_step, adapt.train, context.language_model_loss = report, train, loss
    return code, [*digests, digest_of(seen[0])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_optimizer(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, part: str, layout: str
) -> None:
    changes = {"train__steps": 6, "checkpoint__every": 2, "student__layout": LAYOUTS[layout], "data__valid": None}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    sample = 3 * 8 + 5  # in the third micro-batch of the fourth step
    work = partial(run_poisoned, part, sample, ["adapt", "--config", runs.write_config(config)])
    ranks = pool.run(work, world=2, initialise=False, capture=True)
    for rank in ranks:
        code, (*earlier, after_three_steps, at_the_end) = rank.value
        assert code == 2
        assert at_the_end == after_three_steps
        assert len({*earlier, at_the_end}) == 4, "every earlier step changed the weights"
    (line,) = ranks[0].stderr.splitlines()
    suspects = [28, 29] if part == "loss" else list(range(24, 32))
    assert line.startswith(f"capgap: error: step 4: {'loss' if part == 'loss' else 'gradient norm'} nan is not finite")
    assert f"suspect samples {suspects};" in line
    assert ranks[1].stderr == ""
    assert len(runs.steps_of(tmp_path / "run")) == 3
    assert runs.checkpoints(tmp_path / "run") == ["step_2"]
    assert (tmp_path / "run" / "latest").read_text() == "step_2\n"
