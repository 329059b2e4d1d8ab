"""A signal at any moment: saved within one step where there is something to save, and no process stays behind."""

import importlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from megatron_capgap.__main__ import main
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import environment, job
from tests.support.runs import Material

CHANGES = {"train__steps": 6, "train__eval_every": 2, "checkpoint__every": 2, "train__dropout": 0.1}


@pytest.fixture(scope="module")
def unbroken(pool: WorkerPool, material: Material, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What metrics.jsonl holds after a run of two replicas."""
    config = runs.adapt_config(material, tmp_path_factory.mktemp("unbroken") / "run", **CHANGES)
    return runs.metrics(runs.train(pool, "adapt", config, world=2))


def signal_in(where: str, number: int, words: list[str]) -> int:
    """Runs a command of whose ranks the second is signalled each time that it begins with something."""
    path, name = where.split()
    module = importlib.import_module(f"megatron_capgap.{path}")
    part = getattr(module, name)

    def signalled(*arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == 1:
            signal.raise_signal(number)
        return part(*arguments, **options)

    setattr(module, name, signalled)
    try:
        return main(words)
    finally:
        setattr(module, name, part)


@pytest.fixture(scope="module")
def unbroken_pair(pool: WorkerPool, material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run under tensor 2 that no signal reaches."""
    run_dir = tmp_path_factory.mktemp("pair") / "run"
    return runs.train(pool, "adapt", runs.adapt_config(material, run_dir, student__layout={"tensor": 2}), world=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "where, saved",
    [
        ("training.step reduce_losses", 1),
        ("training.loop save", 2),
        ("training.loop evaluate", 2),
        ("training.evaluate micro_batches", 2),
    ],
)
def test_a_run_that_is_signalled_has_saved_one_step_later(
    pool: WorkerPool,
    material: Material,
    unbroken: list[dict[str, Any]],
    tmp_path: Path,
    where: str,
    saved: int,
    number: signal.Signals,
) -> None:
    """In a step, the first save and the first evaluation, both after the second step; its second batch is left out."""
    config = runs.adapt_config(material, tmp_path / "run", **CHANGES)
    work = partial(signal_in, where, number, ["adapt", "--config", runs.write_config(config)])
    ranks = pool.run(work, world=2, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [0, 0], ranks
    assert f"stopped by {number.name} after step {saved} of 6" in ranks[0].stdout
    assert runs.metrics(tmp_path / "run") == unbroken[:saved], "half an evaluation is none"
    assert (tmp_path / "run" / "latest").read_text() == f"step_{saved}\n"
    assert runs.metrics(runs.train(pool, "adapt", config, world=2)) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("phase", ["start-up", "data building"])
def test_before_the_first_step_it_ends_at_once(
    pool: WorkerPool, material: Material, unbroken_pair: Path, tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    config = runs.adapt_config(material, tmp_path / "run", student__layout={"tensor": 2})
    with job(["adapt", "--config", runs.write_config(config)], 2, tmp_path / "job") as ranks:
        if phase == "data building":
            ranks.wait_until((tmp_path / "run" / "data_cache").exists)
        else:
            time.sleep(0.5)
        ranks.signal(number)
        assert ranks.wait(30) == [-number, -number]
        assert ranks.left_behind() == []
    assert runs.metrics(runs.train(pool, "adapt", config, world=2)) == runs.metrics(unbroken_pair)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_passes_a_signal_on_and_leaves_nobody(
    material: Material, tmp_path: Path, number: signal.Signals
) -> None:
    config = runs.adapt_config(material, tmp_path / "run", train__steps=10**6, data__valid=None)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "megatron_capgap"]
    with open(tmp_path / "output", "w") as output:
        agent = subprocess.Popen(
            [*words, "adapt", "--config", runs.write_config(config)],
            env={**environment(), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while len(runs.steps_of(tmp_path / "run")) < 3:
            assert agent.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.02)
        family = psutil.Process(agent.pid).children(recursive=True)
        agent.send_signal(number)
        assert agent.wait(30) == 1
        assert psutil.wait_procs(family, 5)[1] == []
    finally:
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        with suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
    done = len(runs.steps_of(tmp_path / "run"))
    assert f"stopped by {number.name} after step {done} of" in (tmp_path / "output").read_text()
    assert (tmp_path / "run" / "latest").read_text() == f"step_{done}\n"
