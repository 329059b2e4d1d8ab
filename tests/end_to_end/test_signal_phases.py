"""A signal at any moment: saved within one step where there is something to save, and no process stays behind."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from megatron_capgap.cli import main
from megatron_capgap.distributed.process_group import reserved_port
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import environment, has_torch, job, wait_for
from tests.support.runs import Fixtures

CHANGES = {"train__steps": 6, "train__eval_every": 2, "checkpoint__every": 2, "train__dropout": 0.1}


@pytest.fixture(scope="module")
def unbroken(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What metrics.jsonl holds after a run of two replicas."""
    config = runs.adapt_config(fixtures, tmp_path_factory.mktemp("unbroken") / "run", **CHANGES)
    return runs.metrics(runs.train(pool, "adapt", config, world=2))


def signal_in(where: str, number: int, words: list[str], rank: int = 1) -> int:
    """Runs a command of whose ranks one, the second, is signalled each time that it begins with something."""
    path, name = where.split()
    module = importlib.import_module(f"megatron_capgap.{path}")
    part = getattr(module, name)

    def signalled(*arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == rank:
            signal.raise_signal(number)
        return part(*arguments, **options)

    setattr(module, name, signalled)
    try:
        return main(words)
    finally:
        setattr(module, name, part)


@pytest.fixture(scope="module")
def unbroken_pair(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run under tensor 2 that no signal reaches."""
    run_dir = tmp_path_factory.mktemp("pair") / "run"
    return runs.train(pool, "adapt", runs.adapt_config(fixtures, run_dir, student__layout={"tensor": 2}), world=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "where, saved",
    [
        ("training.step _sum_losses", 1),
        ("training.step _update", 2),
        ("training.loop save", 2),
        ("training.loop evaluate", 2),
        ("training.evaluate micro_batches", 2),
    ],
)
def test_a_run_that_is_signalled_has_saved_one_step_later(
    pool: WorkerPool,
    fixtures: Fixtures,
    unbroken: list[dict[str, Any]],
    tmp_path: Path,
    where: str,
    saved: int,
    number: signal.Signals,
) -> None:
    """In a step, before and after the ranks agree on a stop; in the first save and the first evaluation, both after the
    second step; its second batch is left out."""
    config = runs.adapt_config(fixtures, tmp_path / "run", **CHANGES)
    work = partial(signal_in, where, number, ["adapt", "--config", runs.write_config(config)])
    ranks = pool.run(work, world=2, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [0, 0], ranks
    assert f"stopped by {number.name} after step {saved} of 6" in ranks[0].stdout
    assert runs.metrics(tmp_path / "run") == unbroken[:saved], "half an evaluation is none"
    assert (tmp_path / "run" / "latest").read_text() == f"step_{saved}\n"
    assert runs.metrics(runs.train(pool, "adapt", config, world=2)) == unbroken


@pytest.mark.slow("two ranks start twice")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("phase", ["start-up", "data building"])
def test_before_the_first_step_it_ends_at_once(
    pool: WorkerPool, fixtures: Fixtures, unbroken_pair: Path, tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "run", student__layout={"tensor": 2})
    with job(["adapt", "--config", runs.write_config(config)], 2, tmp_path / "job", cold=phase == "start-up") as ranks:
        if phase == "data building":
            ranks.wait_until((tmp_path / "run" / "data_cache").exists)
        else:
            ranks.wait_until(lambda: all(has_torch(process.pid) for process in ranks.ranks))
        ranks.signal(number)
        assert ranks.wait() == [-number, -number]
        assert ranks.left_behind() == []
    assert runs.metrics(runs.train(pool, "adapt", config, world=2)) == runs.metrics(unbroken_pair)


@contextmanager
def torchrun(words: list[str], config: dict[str, Any], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An agent of torchrun; it and all that it started are gone after the `with` block."""
    command = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "megatron_capgap"]
    with open(output, "w") as file:
        agent = subprocess.Popen(
            [*command, "adapt", "--config", runs.write_config(config)],
            env={**environment(), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family = psutil.Process(agent.pid)
    try:
        yield agent
    finally:
        with suppress(psutil.Error):
            for process in family.children(recursive=True):
                process.kill()
        with suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()


def both_are_started(agent: psutil.Process) -> bool:
    """And at their imports: torchrun knows nothing of a process that it is about to start when a signal comes."""
    children = agent.children()
    return len(children) == 2 and all(has_torch(child.pid) for child in children)


PHASES: dict[str, tuple[dict[str, Any], Callable[[Path, psutil.Process], bool]]] = {
    "warm-up": ({}, lambda run, agent: both_are_started(agent)),
    "a step": ({}, lambda run, agent: len(runs.steps_of(run)) >= 3),
    "an evaluation": ({"train__eval_every": 3}, lambda run, agent: len(runs.steps_of(run)) == 3),
    "a save": ({"checkpoint__every": 1}, lambda run, agent: any((run / "checkpoints").glob(".step_*"))),
}


@pytest.mark.slow("starts an agent of torchrun and its ranks")
@pytest.mark.parametrize(
    "phase, number",
    [
        ("warm-up", signal.SIGUSR1),
        ("a step", signal.SIGINT),
        ("an evaluation", signal.SIGUSR1),
        ("a save", signal.SIGTERM),
    ],
)
def test_torchrun_passes_a_signal_on_and_leaves_nobody(
    fixtures: Fixtures, tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    """The evaluation is over all of the training text: it is stopped in its midst."""
    changes, reached = PHASES[phase]
    run_dir, valid = tmp_path / "run", fixtures.data["train"] if "evaluation" in phase else []
    changes = {"train__steps": 10**6, "train__eval_batches": 10**6, "data__valid": valid, **changes}
    config = runs.adapt_config(fixtures, run_dir, **changes)
    words = ["--standalone", "--nproc-per-node", "2", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    output = tmp_path / "output"
    with torchrun(words, config, output) as agent:
        process = psutil.Process(agent.pid)
        wait_for(
            lambda: reached(run_dir, process) or agent.poll() is not None, 120, phase, output.read_text, every=0.01
        )
        assert agent.poll() is None, output.read_text()
        family = process.children(recursive=True)
        agent.send_signal(number)
        assert agent.wait(120) == 1
        assert psutil.wait_procs(family, 60)[1] == []
    if phase == "warm-up":
        assert not (run_dir / "latest").exists()
        return
    entries = runs.metrics(run_dir)
    done = len(entries)
    assert all("loss" in entry for entry in entries) and (done == 3 or phase != "an evaluation")
    assert f"stopped by {number.name} after step {done} of" in output.read_text()
    assert (run_dir / "latest").read_text() == f"step_{done}\n"


@pytest.mark.slow("starts two agents of torchrun and their ranks")
def test_two_agents_of_torchrun_are_one_job(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "run", student__layout={"tensor": 2})
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
    words += ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint"]
    with (
        reserved_port() as port,
        torchrun([*words, f"127.0.0.1:{port}"], config, tmp_path / "output_0") as one,
        torchrun([*words, f"127.0.0.1:{port}"], config, tmp_path / "output_1") as other,
    ):
        codes = [agent.wait(120) for agent in (one, other)]
    said = [(tmp_path / f"output_{agent}").read_text() for agent in range(2)]
    assert codes == [0, 0], said
    assert sum("finished: 4 steps" in text for text in said) == 1, said
    alone = runs.adapt_config(fixtures, tmp_path / "alone", student__layout={"tensor": 2})
    assert runs.metrics(tmp_path / "run") == runs.metrics(runs.train(pool, "adapt", alone, world=2))
