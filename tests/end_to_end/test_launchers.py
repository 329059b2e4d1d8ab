"""One rank, and two, as each launcher starts them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_capgap.distributed.process_group import reserved_port
from tests.support import debian, runs
from tests.support.processes import environment
from tests.support.runs import Fixtures

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
PLAIN = [sys.executable]
LEFT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What a shell may still hold that once started one rank."""


@pytest.mark.slow("starts a launcher and its ranks")
@pytest.mark.parametrize(
    "launcher, world, left",
    [
        (PLAIN, 1, {**LEFT, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}),
        ([*TORCHRUN, "--nproc-per-node", "1"], 1, LEFT),
        ([*MPIRUN, "-n", "2", sys.executable], 2, {}),
    ],
    ids=["plain", "torchrun", "mpirun"],
)
def test_a_launcher_starts_a_run(
    fixtures: Fixtures, tmp_path: Path, launcher: Sequence[str], world: int, left: dict[str, str]
) -> None:
    if launcher[0] == "mpirun":
        try:
            debian.install(["openmpi-bin"], ["mpirun"])
        except debian.Unavailable as reason:
            pytest.skip(str(reason))
    changes = {"train__steps": 1, "data__valid": None, "student__layout": {"tensor": world}}
    config = runs.write_config(runs.adapt_config(fixtures, tmp_path / "run", **changes))
    done = subprocess.run(
        [*launcher, "-m", "megatron_capgap", "adapt", "--config", config],
        env={**environment(), **left, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"ranks: {world} = tensor {world} x" in done.stdout, done.stdout
    assert len(runs.steps_of(tmp_path / "run")) == 1


def test_ranks_that_a_batch_script_exports_for_all_tasks_are_refused_at_once(
    fixtures: Fixtures, tmp_path: Path
) -> None:
    config = runs.write_config(runs.adapt_config(fixtures, tmp_path / "run"))
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_capgap", "adapt", "--config", config],
        env={**environment(), **task, "RANK": "0", "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "RANK is 0 and WORLD_SIZE is 4, but srun says task 2 of 4" in line
    assert not os.path.exists(tmp_path / "run")


@contextmanager
def rank_of_two(config: str, rank: int, address: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """A rank that is started by hand, and is gone at the end."""
    told = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": address}
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_capgap", "adapt", "--config", config],
        env={**environment(), **told, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_is_none_is_refused_at_once(fixtures: Fixtures, tmp_path: Path, rank: int) -> None:
    config = runs.write_config(runs.adapt_config(fixtures, tmp_path / "run", student__layout={"tensor": 2}))
    with rank_of_two(config, rank, "no-such-host.invalid", 29500) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = said.splitlines()
    assert "MASTER_ADDR is 'no-such-host.invalid', which this host (" in line and "cannot resolve" in line
    assert not os.path.exists(tmp_path / "run")


def told(process: subprocess.Popen[str]) -> str:
    """The first warning about the wait."""
    assert process.stderr is not None
    return next(line for line in process.stderr if " capgap: warning: rank " in line)


@pytest.mark.slow("waits until a rank says that it waits")
@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_waits_for_the_other_says_where(fixtures: Fixtures, tmp_path: Path, first: int) -> None:
    changes = {"train__steps": 1, "data__valid": None, "student__layout": {"tensor": 2}}
    config = runs.write_config(runs.adapt_config(fixtures, tmp_path / "run", **changes))
    with reserved_port() as port, rank_of_two(config, first, "127.0.0.1", port) as waiting:
        line = told(waiting)
        place = f"127.0.0.1 port {port}"
        if first == 1:
            assert f"no response at {place} yet (Connection refused), the address of rank 0 in MASTER_ADDR" in line
        else:
            assert f"{place} responds, but some of the 2 ranks (WORLD_SIZE) have not connected" in line
        assert "; waiting for 20 s, time-out after " in line
        with rank_of_two(config, 1 - first, "127.0.0.1", port) as other:
            _, said = other.communicate(timeout=300)
            _, rest = waiting.communicate(timeout=300)
    assert (waiting.returncode, other.returncode) == (0, 0), said + rest
    assert len(runs.steps_of(tmp_path / "run")) == 1


@pytest.mark.parametrize("joins", [True, False])
def test_what_an_earlier_torchrun_left_is_refused_at_once(fixtures: Fixtures, tmp_path: Path, joins: bool) -> None:
    """With torchrun's store, whose agent is gone; and without it below mpirun, where it beat mpirun's ranks."""
    config = runs.write_config(runs.adapt_config(fixtures, tmp_path / "run"))
    left = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"}
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with reserved_port() as port:
        store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-m", "megatron_capgap", "adapt", "--config", config],
            env={**environment(), **left, **(store if joins else mpi)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    said = "no torchrun agent listens at 127.0.0.1" if joins else "RANK is 0 but mpirun's OMPI_COMM_WORLD_RANK"
    assert said in line
    assert not os.path.exists(tmp_path / "run")
