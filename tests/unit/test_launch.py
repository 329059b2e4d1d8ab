"""Who am I: what torchrun, SLURM and nobody leave in the environment, and what is wrong with it."""

import os
import socket
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_capgap.cli import main
from megatron_capgap.common.errors import UserError
from megatron_capgap.devices import choose
from megatron_capgap.distributed import torchrun
from megatron_capgap.distributed.environment import Environment, read_environment
from megatron_capgap.distributed.process_group import init_process_group, reserved_port, write_outcome

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node07",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_STEP_NODELIST": "gpu07",
    "SLURM_NODELIST": "gpu[05-09]",
}


OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_ess_base_jobid": "647364609",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "5", "MPI_LOCALNRANKS": "8"}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_torchrun() -> None:
    assert read_environment(TORCHRUN) == Environment(5, 8, 1, 4, "node07", 29400, "torchrun")


def test_rank_and_world_size_are_enough_for_one_rank() -> None:
    assert read_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Environment(0, 1, 0, 1, "127.0.0.1", 0, "torchrun")


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_is_none(port: int) -> None:
    environment = read_environment({**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with pytest.raises(UserError, match=f"environment variable MASTER_PORT is {port}; .* 1 to 65535"):
        init_process_group(environment, choose("cpu", 0), timeout_seconds=1)


def test_alone() -> None:
    assert read_environment({"HOME": "/"}) == Environment(0, 1, 0, 1, "127.0.0.1", 0, "single")


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SLURM, *TORCHRUN, *OPENMPI, *MPICH, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert read_environment().launcher == "single"
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_environment().rank == 5


def test_slurm() -> None:
    found = read_environment(SLURM)
    assert (found.rank, found.world, found.local_rank, found.local_world) == (9, 16, 1, 8)
    assert (found.master_addr, found.launcher) == ("gpu07", "slurm")
    assert 20000 <= found.master_port < 32768, "Linux hands out those above by itself"


@pytest.mark.parametrize("given, each", [("8(x2)", 8), ("8", 8), ("1(x16)", 1)])
def test_the_tasks_of_a_node(given: str, each: int) -> None:
    variables = without(SLURM, "SLURM_NTASKS_PER_NODE")
    assert read_environment({**variables, "SLURM_TASKS_PER_NODE": given}).local_world == each
    step = {"SLURM_STEP_TASKS_PER_NODE": given, "SLURM_TASKS_PER_NODE": "3,2"}
    assert read_environment({**variables, **step}).local_world == each, "the step counts, not the job around it"


def test_a_word_for_the_script_around_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPGAP_OUTCOME", raising=False)
    write_outcome("stopped")
    monkeypatch.setenv("CAPGAP_OUTCOME", str(tmp_path / "outcome"))
    assert main(["adapt", "--config", str(tmp_path / "none.yaml")]) == 2
    assert (tmp_path / "outcome").read_text() == "refused\n"
    write_outcome("stopped")
    assert (tmp_path / "outcome").read_text() == "stopped\n"


def test_every_task_of_a_step_finds_the_same_port_and_other_steps_another() -> None:
    ports = {read_environment({**SLURM, "SLURM_PROCID": str(rank)}).master_port for rank in range(16)}
    others = {read_environment({**SLURM, "SLURM_STEP_ID": str(step)}).master_port for step in range(1, 4)}
    other_job = read_environment({**SLURM, "SLURM_JOB_ID": "4712"}).master_port
    assert len(ports) == 1 and len(ports | others | {other_job}) == 5


def test_the_address_and_port_of_the_user_win_under_slurm() -> None:
    found = read_environment({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "555"})
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 555)


@pytest.mark.parametrize("world", [1, 8])
def test_torchrun_inside_of_a_slurm_step_is_torchrun(world: int) -> None:
    """srun has started one agent on each node; under torchrun every rank is a client of the agent's store."""
    agent = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(world)}
    found = read_environment({**SLURM, **TORCHRUN, **agent, "RANK": str(world - 1)})
    assert (found.rank, found.world, found.launcher, found.joins_store) == (world - 1, world, "torchrun", True)


@pytest.mark.parametrize(
    "task",
    [
        {"RANK": "9", "WORLD_SIZE": "16"},  # a task that tells itself who it is
        {"WORLD_SIZE": "16"},  # a batch script that says the number alone
        {"RANK": "19", "WORLD_SIZE": "32", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},  # a launcher in each task
    ],
)
def test_what_agrees_with_slurm(task: dict[str, str]) -> None:
    found = read_environment({**SLURM, **task, "MASTER_ADDR": "gpu05", "MASTER_PORT": "29500"})
    assert (found.rank, found.world) == (int(task.get("RANK", 9)), int(task["WORLD_SIZE"]))


@pytest.mark.parametrize("tasks", [1, 16])
@pytest.mark.parametrize("rank, world", [(0, 4), (0, 16), (3, 4)])
def test_what_a_batch_script_left_in_the_environment_of_all_tasks(tasks: int, rank: int, world: int) -> None:
    task = {**SLURM, "SLURM_PROCID": str(tasks - 1), "SLURM_NTASKS": str(tasks)}
    left = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "gpu05", "MASTER_PORT": "29500"}
    with pytest.raises(UserError) as caught:
        read_environment({**task, **left})
    text = str(caught.value)
    assert f"RANK is {rank} and WORLD_SIZE is {world}, but srun says task {tasks - 1} of {tasks}" in text
    assert "unset RANK and WORLD_SIZE" in text and "\n" not in text


def test_mpirun() -> None:
    address = {"MASTER_ADDR": "node07", "MASTER_PORT": "29400"}
    assert read_environment({**OPENMPI, **address}) == Environment(5, 8, 1, 4, "node07", 29400, "mpirun")
    assert read_environment({**SLURM, **OPENMPI, **address}).launcher == "mpirun", "it has SLURM start its daemons"
    one_host = read_environment({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"})
    assert one_host.master_addr == "127.0.0.1" and 20000 <= one_host.master_port < 32768
    other = read_environment({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_MCA_ess_base_jobid": "1"})
    assert other.master_port != one_host.master_port
    found = read_environment(MPICH)
    assert (found.rank, found.world, found.local_rank, found.local_world) == (5, 8, 5, 8)


def test_the_pmi_of_srun_is_srun() -> None:
    """srun --mpi=pmi2 sets what MPICH's mpirun sets."""
    assert read_environment({**SLURM, "PMI_RANK": "9", "PMI_SIZE": "16"}).launcher == "slurm"
    hydra = {**MPICH, "MASTER_ADDR": "gpu07", "MASTER_PORT": "29400"}
    assert read_environment({**SLURM, **hydra}).launcher == "mpirun", "hydra's proxies are srun's tasks"


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_a_batch_script_or_a_bare_allocation_is_one_rank_alone(step: str | None) -> None:
    variables = without(SLURM, "SLURM_STEP_ID") | ({} if step is None else {"SLURM_STEP_ID": step})
    assert read_environment(variables).launcher == "single"


def test_a_list_of_nodes_is_unfolded_by_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[05-09]" ] && echo gpu05 && echo gpu06\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert read_environment(without(SLURM, "SLURM_STEP_NODELIST")).master_addr == "gpu05"


def test_without_scontrol_the_list_of_nodes_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"SLURM_NODELIST 'gpu\[05-09\]': scontrol could not .*; set MASTER_ADDR"):
        read_environment(without(SLURM, "SLURM_STEP_NODELIST"))


@pytest.mark.parametrize("value", ["", "  ", "abc", "1.5", pytest.param("9" * 5000, id="long")])
@pytest.mark.parametrize(
    "variables, name",
    [(TORCHRUN, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")]
    + [(SLURM, name) for name in SLURM if not name.endswith("NODELIST")]
    + [(without(OPENMPI, "OMPI_MCA_ess_base_jobid"), name) for name in OPENMPI if not name.endswith("jobid")]
    + [(MPICH, name) for name in MPICH],
)
def test_a_variable_that_is_no_number_is_named_and_an_empty_one_is_none(
    variables: dict[str, str], name: str, value: str
) -> None:
    address = {"MASTER_ADDR": "node07", "MASTER_PORT": "29400"}
    if value.strip():
        with pytest.raises(UserError) as caught:
            read_environment({**address, **variables, name: value})
        text = str(caught.value)
        assert text.startswith(f"environment variable {name} is {value[:40]!r}") and "\n" not in text
        assert len(text) < 250
        return
    outcomes: list[Environment | str] = []
    for given in ({**variables, name: value}, without(variables, name)):
        try:
            outcomes.append(read_environment({**address, **given} if name != "MASTER_PORT" else given))
        except UserError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    rank = {"RANK", "WORLD_SIZE", *(key for key in (*OPENMPI, *MPICH) if key.endswith(("_RANK", "_SIZE")))}
    if name in rank and "LOCAL" not in name:
        assert str(outcomes[0]).startswith(f"environment variable {name} is not set; ")


def test_a_step_without_a_number_is_named_where_there_is_no_step() -> None:
    with pytest.raises(UserError, match=r"^environment variable SLURM_STEP_ID is 'abc', not a number; unset it"):
        read_environment({"SLURM_STEP_ID": "abc"})
    assert read_environment({"SLURM_STEP_ID": "", "RANK": "", "TORCHELASTIC_RUN_ID": "none"}).launcher == "single"


AGENT = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize("mpi", [{**OPENMPI, "OMPI_COMM_WORLD_SIZE": "6"}, {**MPICH, "PMI_SIZE": "6"}])
def test_agents_that_mpirun_started_are_torchrun(mpi: dict[str, str]) -> None:
    ranks = {**TORCHRUN, "RANK": "3", "WORLD_SIZE": "24"}  # agents may be numbered in another order
    found = read_environment({**mpi, **ranks, **AGENT})
    assert (found.rank, found.world, found.launcher, found.joins_store) == (3, 24, "torchrun", True)


@pytest.mark.parametrize("left", [AGENT, {"TORCHELASTIC_RUN_ID": "none"}, {**AGENT, "LOCAL_WORLD_SIZE": "1"}])
@pytest.mark.parametrize("mpi", [OPENMPI, MPICH])
def test_what_an_earlier_torchrun_left_does_not_beat_mpirun(mpi: dict[str, str], left: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        read_environment({**mpi, **left, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "node07"})
    text = str(caught.value)
    assert "RANK is 0" in text and " are 5 and 8; unset RANK" in text and "\n" not in text


def test_what_an_earlier_torchrun_left_does_not_beat_srun() -> None:
    with pytest.raises(UserError, match="RANK is 0 and WORLD_SIZE is 1, but srun says task 9 of 16"):
        read_environment({**SLURM, "TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"})


def test_a_store_of_an_agent_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "_PAUSE_SECONDS", 0.01)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        monkeypatch.delenv(name)
    for name, value in {**AGENT, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GROUP_RANK", "0")
    with reserved_port() as port:
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError) as caught:
            torchrun.drop_stale_agent_variables(read_environment())
        text = str(caught.value)
        assert f"no torchrun agent listens at 127.0.0.1 port {port} (Connection refused)" in text
        for name in (*AGENT, "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            assert name in text.partition("unset the variables of an earlier one: ")[2].split()
        with socket.create_server(("127.0.0.1", port)):
            with pytest.raises(UserError) as caught:  # of another job
                torchrun.drop_stale_agent_variables(read_environment())
            text = str(caught.value)
            assert f", is not the torchrun agent with the store at 127.0.0.1 port {port}, which may belong" in text
            assert (
                "GROUP_RANK" in text.partition("unset the variables of an earlier one: ")[2].split()
                and "\n" not in text
            )
            monkeypatch.setenv("GROUP_RANK", "1")  # its agent keeps no store
            torchrun.drop_stale_agent_variables(read_environment())
    monkeypatch.setenv("MASTER_PORT", "77777")
    with pytest.raises(UserError, match=r"no torchrun agent .* port 77777"):
        torchrun.drop_stale_agent_variables(read_environment())
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    torchrun.drop_stale_agent_variables(read_environment({}))
    assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ, "torch would join a store that is none of this job's"


RANK = (
    "from megatron_capgap.distributed import environment, torchrun; "
    "torchrun.drop_stale_agent_variables(environment.read_environment()); print('joins')"
)


@pytest.mark.parametrize("above", ["", "sh -c", "sh -c 'exec", "env A=B sh -c"])
def test_a_rank_finds_its_agent_behind_other_programs(tmp_path: Path, above: str) -> None:
    """The process above them keeps the store, as torchrun's agent does; or keeps another one."""
    (tmp_path / "rank.sh").write_text(f'{sys.executable} -c "{RANK}"\n')
    command = {"": "sh rank.sh", "sh -c": "sh -c 'sh rank.sh; true'", "sh -c 'exec": "sh -c 'exec sh rank.sh'"}
    started = command.get(above, "env A=B sh -c 'sh rank.sh; true'")
    job = (
        "import os, socket, subprocess, sys\n"
        "store, other = socket.create_server(('127.0.0.1', 0)), socket.create_server(('127.0.0.1', 0))\n"
        "named = {'keeps': store, 'has ended': other}[sys.argv[1]]\n"
        "if named is other:\n"  # another process keeps it
        "    keeper = subprocess.Popen(['sleep', '60'], pass_fds=[other.fileno()])\n"
        "port = str(named.getsockname()[1])\n"
        "other.close()\n"
        f"ranks = dict({ {**AGENT, 'RANK': '0', 'WORLD_SIZE': '1', 'GROUP_RANK': '0'}!r})\n"
        "ranks.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)\n"
        f"done = subprocess.run({started!r}, shell=True, env=os.environ | ranks, capture_output=True, text=True)\n"
        "print(done.stdout, done.stderr)\n"
        "named is other and keeper.kill()\n"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for how, expected in (("keeps", "joins"), ("has ended", "is not the torchrun agent with the store")):
        done = subprocess.run(
            [sys.executable, "-c", job, how], env=path, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert expected in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (without(TORCHRUN, "RANK"), "RANK is not set; start the ranks with torchrun or srun"),
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE is not set; "),
        (TORCHRUN | {"RANK": "two"}, "RANK is 'two', not a number; "),
        (TORCHRUN | {"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', not a number; "),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8 but WORLD_SIZE is 8; ranks count from 0 to WORLD_SIZE - 1"),
        (TORCHRUN | {"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one', not a number; "),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number; "),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is not set; start the ranks with torchrun or srun"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set; "),
        (without(SLURM, "SLURM_NTASKS"), "SLURM_NTASKS is not set; "),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not set; "),
        (
            SLURM | {"SLURM_TASKS_PER_NODE": "9,7"},
            "SLURM_TASKS_PER_NODE is '9,7': every node must run the same number of ranks; ",
        ),
        (SLURM | {"SLURM_TASKS_PER_NODE": "2(x3),1"}, "SLURM_TASKS_PER_NODE is '2(x3),1': every node must "),
        (
            without(SLURM, "SLURM_NTASKS_PER_NODE") | {"SLURM_STEP_TASKS_PER_NODE": "x"},
            "SLURM_STEP_TASKS_PER_NODE is 'x'",
        ),
        (SLURM | {"SLURM_PROCID": "16"}, "SLURM_PROCID is 16 but SLURM_NTASKS is 16; "),
        (OPENMPI, "MASTER_ADDR is not set, and mpirun started 8 ranks on several hosts; set it to the host of rank 0"),
        (OPENMPI | {"RANK": "0"}, "RANK is 0 but mpirun's OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE are 5 and 8; "),
        (OPENMPI | {"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 but mpirun's OMPI_COMM_WORLD_RANK and "),
    ],
)
def test_what_contradicts_is_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_environment(variables)
    text = str(caught.value)
    assert text.startswith(f"environment variable {message}") and "\n" not in text


def test_a_port_is_held_for_the_store_that_will_listen_on_it() -> None:
    with reserved_port() as one, reserved_port() as other:
        assert one != other
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", one))
        store = dist.TCPStore("127.0.0.1", one, is_master=True, timeout=timedelta(seconds=60))
        store.set("key", "value")
        assert dist.TCPStore("127.0.0.1", one, is_master=False).get("key") == b"value"
