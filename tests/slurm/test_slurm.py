"""A distillation on a real SLURM of four nodes: stopped, preempted, out of time, bereft of a node; it always goes on."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.config.files import write_atomically
from tests.slurm import cluster as slurm
from tests.slurm.cluster import Cluster, wait_for
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import ROOT
from tests.support.runs import Material

SCRIPT = str(ROOT / "examples" / "slurm" / "stage.sbatch")
STEPS = 150
LAYOUT = {"tensor": 2, "pipeline": 2, "sequence": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        slurm.install()
    except slurm.Unavailable as reason:
        pytest.skip(str(reason))
    with slurm.running() as running:
        yield running


def config_of(material: Material, run_dir: Path, teacher: Path, **changes: Any) -> dict[str, Any]:
    """A run that a job is still busy with when something happens to it, and a checkpoint that it goes back to."""
    whole = {"train__steps": STEPS, "train__dropout": 0.1, "checkpoint__every": 10, "student__layout": LAYOUT}
    return runs.distill_config(material, run_dir, teacher, **{**whole, "train__eval_batches": 1, **changes})


@pytest.fixture(scope="module")
def undisturbed(
    pool: WorkerPool, material: Material, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What metrics.jsonl holds after the run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return runs.metrics(runs.train(pool, "distill", config_of(material, folder / "run", teacher), world=4))


class Submitted:
    """A job of stage.sbatch on four nodes of one rank each."""

    def __init__(self, cluster: Cluster, folder: Path, config: dict[str, Any], *options: str) -> None:
        self.cluster, self.run_dir, self.folder = cluster, Path(config["run_dir"]), folder
        words = ["sbatch", "--parsable", "--nodes=4", "--exclusive", *options, SCRIPT]
        words += ["distill", "--config", runs.write_config(config)]
        self.number = cluster.run(*words, cwd=folder, variables={"GLOO_SOCKET_IFNAME": "lo"})

    def output(self) -> str:
        """What the job has printed in all its starts."""
        path = self.folder / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def state(self) -> str:
        """As SLURM says it: PENDING, RUNNING, COMPLETED, FAILED ..."""
        return self.cluster.job(self.number, "JobState")

    def wait_for_step(self, step: int) -> None:
        """Until a step after a checkpoint is in metrics.jsonl."""
        wait_for(lambda: len(runs.steps_of(self.run_dir)) >= step, 90, f"step {step}", self.output)

    def wait_for_end(self, limit: float = 120.0) -> str:
        """Until SLURM keeps the job no longer going; returns its last state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        wait_for(lambda: self.state() in ends, limit, "the end of the job", self.output)
        return self.state()

    def restarts(self) -> int:
        """How often SLURM has started it again."""
        return int(self.cluster.job(self.number, "Restarts"))


def test_preempted_by_a_signal(
    cluster: Cluster, material: Material, teacher: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = Submitted(cluster, tmp_path, config_of(material, tmp_path / "run", teacher))
    job.wait_for_step(13)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait_for_end() == "COMPLETED", job.output()
    assert job.restarts() == 1
    (stopped,) = re.findall(r"stopped by SIGUSR1 after step (\d+) of", job.output())
    assert 13 <= int(stopped) < STEPS
    assert f"resumed from {job.run_dir}/checkpoints/step_{stopped}" in job.output()
    assert runs.metrics(job.run_dir) == undisturbed
