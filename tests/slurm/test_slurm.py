"""A distillation on a real SLURM of four nodes: preempted, out of time, bereft of a node or a rank, it goes on."""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.test_sweep import grid as small_grid
from tests.slurm import cluster as slurm
from tests.slurm.cluster import Cluster
from tests.support import runs
from tests.support.debian import Unavailable
from tests.support.failures import on_failure
from tests.support.pool import WorkerPool
from tests.support.processes import ROOT, seed_of, wait_for
from tests.support.runs import Fixtures
from tools import make_sweep

SCRIPT = str(ROOT / "examples" / "slurm" / "stage.sbatch")
STEPS = 40
LIMIT = 300.0
"""Seconds for anything that a busy machine may take its time for. srun alone waits a minute or two where the nodes
still clean up after the job before and it misses the controller's word that they are free."""
pytestmark = pytest.mark.timeout(1500)
LAYOUT = {"tensor": 2, "pipeline": 2, "sequence": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        slurm.install()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with slurm.running() as running:
        yield running


def config_of(fixtures: Fixtures, run_dir: Path, teacher: Path, **changes: Any) -> dict[str, Any]:
    """A run that a job is still busy with when something happens to it, and a checkpoint that it goes back to."""
    whole = {"train__steps": STEPS, "train__dropout": 0.1, "checkpoint__every": 4, "student__layout": LAYOUT}
    whole |= {"train__eval_batches": 1, "optimizer__schedule": "constant"}
    return runs.distill_config(fixtures, run_dir, teacher, **{**whole, **changes})


@pytest.fixture(scope="module")
def undisturbed(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What metrics.jsonl holds after the run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return runs.metrics(runs.train(pool, "distill", config_of(fixtures, folder / "run", teacher), world=4))


class Submitted:
    """A job of stage.sbatch on four nodes of one rank each."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        config: dict[str, Any],
        *options: str,
        words: Sequence[str] = (),
        starts: int = 10,
        python: str = "python",
        left: Mapping[str, str] | None = None,
    ) -> None:
        self.cluster, self.run_dir, self.folder = cluster, Path(config["run_dir"]), folder
        self.words = ["distill", "--config", runs.write_config(config), *words]
        command = ["sbatch", "--parsable", "--nodes=4", "--exclusive", *options, SCRIPT, *self.words]
        variables = {"CAPGAP_MOST_STARTS": str(starts), "CAPGAP_PYTHON": python, **(left or {})}
        self.number = cluster.run(*command, cwd=folder, variables=variables)
        on_failure(f"SLURM job {self.number}", self.report)

    def output(self) -> str:
        """What the job has printed in all its starts."""
        path = self.folder / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def report(self) -> str:
        """The last lines of the job, which are those of all its ranks, and of SLURM's daemons."""
        lines = self.output().splitlines()[-60:]
        return "\n".join([f"seed: {seed_of(self.words)}", *lines, self.cluster.logs()])

    def says(self, pattern: str) -> bool:
        """Whether a regular expression is found in it."""
        return re.search(pattern, self.output()) is not None

    def state(self) -> str:
        """As SLURM says it: PENDING, RUNNING, COMPLETED, FAILED ..."""
        return self.cluster.job(self.number, "JobState")

    def wait_for_step(self, step: int) -> None:
        """Until a step after a checkpoint is in metrics.jsonl."""
        wait_for(lambda: len(runs.steps_of(self.run_dir)) >= step, LIMIT, f"step {step}", self.output)

    def wait_for_end(self, limit: float = LIMIT) -> str:
        """Until SLURM keeps the job no longer going; returns its last state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        wait_for(lambda: self.state() in ends, limit, "the end of the job", self.output)
        return self.state()

    def signal_rank(self, number: signal.Signals) -> None:
        """Stops or kills one rank of the four, as the kernel does where memory is short."""
        (pid,) = self.cluster.ranks_on(self.cluster.nodes[1])
        os.kill(pid, number)

    def restarts(self) -> int:
        """How often SLURM has started it again."""
        return int(self.cluster.job(self.number, "Restarts"))


def test_a_preempted_job_saves_comes_back_and_finishes(
    cluster: Cluster, fixtures: Fixtures, teacher: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = Submitted(cluster, tmp_path, config_of(fixtures, tmp_path / "run", teacher))
    job.wait_for_step(6)
    cluster.run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert job.wait_for_end() == "COMPLETED", job.output()
    (stopped,) = map(int, re.findall(r"stopped by SIGTERM after step (\d+) of", job.output()))
    assert 6 <= stopped < STEPS
    assert job.restarts() == 1
    assert f"resumed from {job.run_dir}/checkpoints/step_{stopped}: " in job.output()
    assert runs.metrics(job.run_dir) == undisturbed


def test_a_job_whose_own_time_is_up_and_that_lost_a_node_goes_on(
    cluster: Cluster, fixtures: Fixtures, teacher: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The first start may take one step; the next one has all the time, loses a node, and what came after its last
    checkpoint is done again."""
    config = config_of(fixtures, tmp_path / "run", teacher)
    job = Submitted(cluster, tmp_path, runs.changed(config, train__exit_after_minutes=1e-6))
    afterwards = ["sbatch", "--parsable", f"--dependency=afterok:{job.number}", "--kill-on-invalid-dep=yes"]
    next_job = cluster.run(*afterwards, "--output=/dev/null", "--wrap=true")
    wait_for(lambda: job.says("start 1 stopped before the end of the run; requeued"), LIMIT, "its time", job.output)
    assert job.says("stopped by train.exit_after_minutes after step 1 of")
    runs.write_config(config)
    job.wait_for_step(6)
    cluster.kill_node(cluster.nodes[2])
    wait_for(lambda: job.restarts() == 2, LIMIT, "requeueing", job.output)
    cluster.start_node(cluster.nodes[2])
    assert cluster.job(next_job, "JobState") == "PENDING"
    assert job.wait_for_end() == "COMPLETED", job.output()
    wait_for(lambda: cluster.job(next_job, "JobState") == "COMPLETED", LIMIT, "what waited for its end", job.output)
    first, second = map(int, re.findall(r"resumed from \S+: step (\d+) of", job.output()))
    assert first == 1 and second in range(4, STEPS, 4)
    assert job.output().count("stopped by") == 1
    assert runs.metrics(job.run_dir) == undisturbed


def test_a_job_that_lost_a_rank_comes_back_as_often_as_it_may(
    cluster: Cluster, fixtures: Fixtures, teacher: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The first time it stands still: the others leave after the time-out, and SLURM kills what does not go by itself
    KillWait seconds later. The second time it is killed."""
    limit = 20
    job = Submitted(
        cluster, tmp_path, config_of(fixtures, tmp_path / "run", teacher, runtime__timeout_seconds=limit), starts=2
    )
    job.wait_for_step(6)
    began = time.monotonic()
    job.signal_rank(signal.SIGSTOP)
    wait_for(lambda: job.says(r"start 1 died \(exit code \d+\); requeued"), LIMIT, "requeueing", job.output)
    assert time.monotonic() - began < limit + slurm.KILL_WAIT + 30, job.output()
    assert job.says(
        rf"rank 1 on {re.escape(cluster.host_of(cluster.nodes[1]))}, last heartbeat in (the save after )?step "
    ), job.output()
    wait_for(lambda: job.says("resumed from"), LIMIT, "the next start", job.output)
    job.wait_for_step(12)
    job.signal_rank(signal.SIGKILL)
    assert job.wait_for_end() == "FAILED"
    assert job.says(r"start 2 died \(exit code \d+\); not requeued, CAPGAP_MOST_STARTS is 2"), job.output()
    assert job.restarts() == 1
    lines = runs.metrics(job.run_dir)
    assert lines == undisturbed[: len(lines)] and len(lines) >= 12


def test_the_end_of_the_time_is_no_end_of_the_run(
    cluster: Cluster,
    pool: WorkerPool,
    fixtures: Fixtures,
    teacher: Path,
    undisturbed: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """SLURM looks at its limits, which are whole minutes, every half a minute: this run goes on until it does."""
    config = config_of(fixtures, tmp_path / "run", teacher, train__steps=10**6, checkpoint__every=0)
    job = Submitted(cluster, tmp_path, config, "--time=60", "--signal=B:USR1@600")
    job.wait_for_step(6)
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=5")  # less than the notice
    wait_for(lambda: job.restarts() == 1, LIMIT, "requeueing", job.output)
    cluster.run(
        "scontrol", "update", f"JobId={job.number}", "TimeLimit=60"
    )  # or the next start is asked to end as well
    (stopped,) = map(int, re.findall(r"stopped by SIGUSR1 after step (\d+) of", job.output()))
    wait_for(lambda: "resumed from" in job.output(), LIMIT, "the next start", job.output)
    job.wait_for_step(stopped + 2)
    cluster.run("scancel", job.number)  # a user's: the ranks save, and the job does not come back
    wait_for(lambda: job.state() == "CANCELLED", LIMIT, "its end", job.output)
    assert job.restarts() == 1
    found, common = runs.steps_of(job.run_dir), min(STEPS, stopped)
    assert found[:common] == undisturbed[:common]
    # From the checkpoint that it had left, what another start does without SLURM.
    again = runs.rewind(job.run_dir, tmp_path / "again", step=stopped)
    (again / "in_use.json").unlink(missing_ok=True)
    config = runs.changed(config, run_dir=str(again), train__steps=stopped + 2, data__valid=None)
    assert runs.steps_of(runs.train(pool, "distill", config, world=4)) == found[: stopped + 2]


@pytest.mark.parametrize(
    "options, how, message",
    [
        ((), {"words": ["--train.stepz=3"]}, "train.stepz: unknown key"),
        (("--nodes=2", "--ntasks=5", "--ntasks-per-node=4"), {}, "every node must run the same number of ranks"),
        ((), {"left": {"RANK": "0", "WORLD_SIZE": "4"}}, "RANK is 0 and WORLD_SIZE is 4, but srun says task"),
        ((), {"python": "nopython"}, "stage.sbatch: error: no node can run nopython -m megatron_capgap (see above); "),
    ],
    ids=["configuration", "unequal nodes", "left ranks", "environment"],
)
def test_what_would_be_refused_again_is_not_requeued(
    cluster: Cluster, fixtures: Fixtures, teacher: Path, tmp_path: Path, options: Any, how: Any, message: str
) -> None:
    config = config_of(fixtures, tmp_path / "run", teacher)
    job = Submitted(cluster, tmp_path, config, *options, **how)
    assert job.wait_for_end() == "FAILED", job.output()
    assert cluster.job(job.number, "ExitCode") == "2:0"
    assert message in job.output()
    assert job.restarts() == 0
    assert not (tmp_path / "run").exists()


# In the place of python; ranks other than the second leave a file of their start and process before they begin.
LACKING = """\
#!/bin/sh
start={begun}-$SLURM_RESTART_COUNT-$SLURM_STEP_ID
if [ "$SLURM_NODEID" != 1 ]; then
    touch "$start-$SLURM_NODEID"
    exec {python} "$@"
fi
until [ -e "$start-0" ] && [ -e "$start-2" ] && [ -e "$start-3" ]; do sleep 0.05; done
exit 127
"""


def test_a_node_without_the_program_is_no_wrong_environment(
    cluster: Cluster, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """One of four: the ranks die, and the job comes back until it may no longer. The node finds out when the others
    run: a task that ends while SLURM still starts them may leave them to their own time-out."""
    python = tmp_path / "python"
    python.write_text(LACKING.format(begun=tmp_path / "begun", python=sys.executable))
    python.chmod(0o755)
    config = config_of(fixtures, tmp_path / "run", teacher, runtime__timeout_seconds=20)
    job = Submitted(cluster, tmp_path, config, starts=2, python=str(python))
    assert job.wait_for_end() == "FAILED", job.output()
    assert job.says(r"start 1 died \(exit code \d+\); requeued") and job.says("not requeued, CAPGAP_MOST_STARTS is 2")
    assert job.restarts() == 1


def test_the_recipe_s_stages_follow_each_other(cluster: Cluster, fixtures: Fixtures, tmp_path: Path) -> None:
    """Its script, with stages of its own: what comes next waits for a stage that comes back once, and is cancelled
    where it fails."""
    recipe = tmp_path / "examples" / "minima_3b"
    recipe.mkdir(parents=True)
    (tmp_path / "examples" / "slurm").mkdir()
    shutil.copy(SCRIPT, tmp_path / "examples" / "slurm")
    shutil.copy(ROOT / "examples" / "minima_3b" / "run.sh", recipe)
    adapt = runs.adapt_config(fixtures, tmp_path / "run", train__steps=2, train__exit_after_minutes=1e-6)
    runs.write_config(adapt, recipe / "adapt.yaml")
    evaluate = runs.changed(adapt, run_dir=str(tmp_path / "evaluate"), train=None, optimizer=None, checkpoint=None)
    evaluate["student"] = {"checkpoint": adapt["run_dir"]}
    runs.write_config(evaluate, recipe / "evaluate.yaml")

    def submit(*words: str) -> tuple[str, str]:
        variables = {"WORK": str(tmp_path), "NODES": "2", "GPUS": "1"}
        one, other = re.findall(r"job (\d+)", cluster.run("bash", str(recipe / "run.sh"), *words, variables=variables))
        return one, other

    def states(*jobs: str) -> list[str]:
        return [cluster.job(job, "JobState") for job in jobs]

    def output() -> str:
        return "\n".join(file.read_text() for file in sorted(tmp_path.glob("slurm-*.out")))

    jobs = submit("adapt", "evaluate")
    wait_for(lambda: cluster.job(jobs[0], "Restarts") == "1", LIMIT, "the second start", output)
    assert states(jobs[1]) == ["PENDING"]
    wait_for(lambda: states(*jobs) == ["COMPLETED", "COMPLETED"], LIMIT, "the evaluation", output)
    assert len(runs.steps_of(tmp_path / "run")) == 2 and (tmp_path / "evaluate" / "evaluation.json").is_file()
    jobs = submit("adapt", "evaluate", "--train.stepz=3")
    wait_for(lambda: states(*jobs) == ["FAILED", "CANCELLED"], LIMIT, "the end of the call", output)


def test_a_sweep_has_as_many_runs_at_a_time_as_it_may(
    cluster: Cluster, pool: WorkerPool, fixtures: Fixtures, tmp_path: Path
) -> None:
    """A teacher, then three students of which two may run at a time. The last one, whose number is the array's too, is
    signalled in its first evaluation, and comes back alone."""
    out, file = tmp_path / "sweep", tmp_path / "grid.yaml"
    row = {"init": "random", "teachers": ["t1"], "seeds": [1, 2, 3], "labels": False}
    grid = small_grid(fixtures, out, rows=[row])
    grid["students"].pop("s2")
    grid["teachers"].pop("t2")
    grid["distill"]["train"] = {"steps": 8, "eval_every": 4, "eval_batches": 200}
    grid["distill"]["data"] = {"valid": fixtures.data["train"] * 3}  # seconds to be signalled in
    file.write_text(yaml.safe_dump(grid))
    assert make_sweep.main([str(file)]) == 0
    said = cluster.run("bash", str(out / "slurm" / "submit.sh"), variables={"LIMIT": "2"})
    last = re.findall(r"job (\d+)", said)[-1]
    signalled, most = out / "runs" / "random-s1-t1-seed3", 0

    def states() -> list[str]:
        nonlocal most
        found = cluster.run("squeue", "-h", "-r", "-t", "all", "-j", last, "-o", "%T").split()
        most = max(most, found.count("RUNNING"))
        return found

    wait_for(lambda: bool(states()) and len(runs.steps_of(signalled)) == 4, 2 * LIMIT, "the last run", lambda: said)
    cluster.run("scancel", "--signal=USR1", "--batch", f"{last}_2")
    wait_for(lambda: set(states()) == {"COMPLETED"}, 2 * LIMIT, "the sweep", lambda: said)
    assert most == 2
    assert [cluster.job(f"{last}_{task}", "Restarts") for task in range(3)] == ["0", "0", "1"]
    assert "stopped by SIGUSR1 after step 4 of 8" in (out / "slurm" / f"law-sweep_{last}_2.out").read_text()
    records = sorted(path.parent.name for path in out.glob("runs/*/record.json"))
    assert records == [f"random-s1-t1-seed{seed}" for seed in (1, 2, 3)]
    alone = yaml.safe_load((out / "configs" / f"{signalled.name}.yaml").read_text())
    alone = runs.train(pool, "distill", {**alone, "run_dir": str(tmp_path / "alone")})
    assert runs.metrics(signalled) == runs.metrics(alone)
