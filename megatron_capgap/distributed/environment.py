"""Launch environment: rank, world size and rendezvous address, as set by torchrun, SLURM or mpirun.

Imports no torch, so that `--help` and `--check` start fast.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed import slurm

# srun numbers steps from 0; the batch script itself and an salloc shell have huge step ids or none.
_LARGEST_STEP_ID = 1 << 30
# Below Linux's ephemeral ports, which start at 32768.
_FIRST_PORT, _PORTS = 20000, 12000


class _Mpi(NamedTuple):
    """Names of the variables that an mpirun sets for its ranks."""

    rank: str
    world: str
    local_rank: str
    local_world: str


_MPI = (
    _Mpi("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Mpi("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Mpi("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI and SLURM with MPI
)
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_")
"""Prefixes of variables that torchrun and mpirun set for their own ranks only."""
_MPI_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "SLURM_JOB_ID")


@dataclass(frozen=True)
class Environment:
    """This process among all processes of the job."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str
    master_port: int
    launcher: str
    """torchrun (or any launcher that sets RANK and WORLD_SIZE), slurm, mpirun or single."""
    joins_store: bool = False
    """Whether the launcher hosts the job's store at the master address, with every rank as a client."""


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Reads rank and world size from the launcher's variables; an empty variable counts as unset.

    Args:
        variables: the environment; `os.environ` by default.

    Raises:
        UserError: the launcher's variables are inconsistent, or one is missing.
    """
    given = os.environ if variables is None else variables
    env = {name: value for name, value in given.items() if value.strip()}
    mpi = next((names for names in _MPI if names.rank in env or names.world in env), None)
    if mpi == _MPI[-1] and _check_consistent(env, mpi.rank, mpi.world, "SLURM_PROCID", "SLURM_NTASKS"):
        mpi = None
    # A rank of torchrun: variables of SLURM and mpirun describe its agent. torchrun always sets both.
    if "TORCHELASTIC_RUN_ID" in env and "TORCHELASTIC_USE_AGENT_STORE" in env:
        if mpi:
            _check_agents(env, mpi)
        return _from_torchrun(env)
    if mpi:
        return _from_mpirun(env, mpi)
    in_step = 0 <= _number(env, "SLURM_STEP_ID", _LARGEST_STEP_ID) < _LARGEST_STEP_ID and "SLURM_PROCID" in env
    if in_step and "RANK" not in env and env.get("WORLD_SIZE") == env.get("SLURM_NTASKS"):
        return _from_slurm(env)  # a batch script that exports WORLD_SIZE but not RANK
    if "RANK" in env or "WORLD_SIZE" in env:
        if in_step:
            _check_against_slurm(env)
        return _from_torchrun(env)
    if in_step:
        return _from_slurm(env)
    return Environment(0, 1, 0, 1, "127.0.0.1", 0, "single")


def _check_consistent(env: Mapping[str, str], rank: str, world: str, other_rank: str, other_world: str) -> bool:
    return env.get(rank) == env.get(other_rank) and env.get(world) == env.get(other_world)


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    value = env.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(
            f"environment variable {key} is not set; start the ranks with torchrun or srun, or unset RANK and "
            "WORLD_SIZE"
        )
    if not value.isdecimal() or len(value) > slurm.DIGITS:
        raise UserError(
            f"environment variable {key} is {value[:40]!r}, not a number; unset it, or start the ranks with torchrun "
            "or srun, which set it"
        )
    return int(value)


def _rank_and_world(env: Mapping[str, str], rank_key: str, world_key: str) -> tuple[int, int]:
    rank, world = _number(env, rank_key), _number(env, world_key)
    if rank >= world:
        raise UserError(
            f"environment variable {rank_key} is {rank} but {world_key} is {world}; "
            f"ranks count from 0 to {world_key} - 1"
        )
    return rank, world


def _from_torchrun(env: Mapping[str, str]) -> Environment:
    rank, world = _rank_and_world(env, "RANK", "WORLD_SIZE")
    if world > 1:
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            if key not in env:
                raise UserError(f"environment variable {key} is not set; start the ranks with torchrun or srun")
    return Environment(
        rank,
        world,
        _number(env, "LOCAL_RANK", rank),
        _number(env, "LOCAL_WORLD_SIZE", world),
        env.get("MASTER_ADDR", "127.0.0.1"),
        _number(env, "MASTER_PORT", 0),
        "torchrun",
        env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _check_against_slurm(env: Mapping[str, str]) -> None:
    """Checks RANK and WORLD_SIZE within a SLURM step. Valid: set by each task to its own task number, or by a launcher
    in each task for its ranks. Values exported by a batch script would give all tasks the same rank."""
    rank, world = _rank_and_world(env, "RANK", "WORLD_SIZE")
    task, tasks = _rank_and_world(env, "SLURM_PROCID", "SLURM_NTASKS")
    each = _number(env, "LOCAL_WORLD_SIZE", 1) or 1
    own = (rank, world) == (task, tasks)
    launched = "LOCAL_RANK" in env and world == tasks * each and rank // each == task
    if not (own or launched):
        raise UserError(
            f"environment variables RANK is {rank} and WORLD_SIZE is {world}, but srun says task {task} of {tasks}; "
            "unset RANK and WORLD_SIZE before srun"
        )


def _check_agents(env: Mapping[str, str], names: _Mpi) -> None:
    """Checks torchrun's variables below mpirun. Valid: mpirun started one torchrun agent per process. Variables left by
    an earlier torchrun would give all processes the same rank."""
    rank, world = _rank_and_world(env, "RANK", "WORLD_SIZE")
    process, processes = _rank_and_world(env, names.rank, names.world)
    if world != processes * _number(env, "LOCAL_WORLD_SIZE", 1):
        raise UserError(
            f"environment variables RANK is {rank} and WORLD_SIZE is {world}, but mpirun's {names.rank} and "
            f"{names.world} are {process} and {processes}; unset RANK, WORLD_SIZE and TORCHELASTIC_RUN_ID before "
            f"mpirun, or {names.rank} and {names.world} before torchrun"
        )


def _from_mpirun(env: Mapping[str, str], names: _Mpi) -> Environment:
    rank, world = _rank_and_world(env, names.rank, names.world)
    for key, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if key in env and _number(env, key) != value:
            raise UserError(
                f"environment variable {key} is {env[key]} but mpirun's {names.rank} and {names.world} are {rank} and "
                f"{world}; unset RANK and WORLD_SIZE before mpirun"
            )
    local_world = _number(env, names.local_world, world)
    address = env.get("MASTER_ADDR")
    if address is None and local_world < world:
        raise UserError(
            f"environment variable MASTER_ADDR is not set, and mpirun started {world} ranks on several hosts; set it "
            "to the host of rank 0, as in mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
        )
    # The same port for all ranks of this job, and most likely a different one for another job on this host.
    job = next((env[name] for name in _MPI_JOB if name in env), "")
    port = _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    return Environment(
        rank,
        world,
        _number(env, names.local_rank, rank),
        local_world,
        address or "127.0.0.1",
        _number(env, "MASTER_PORT", port),
        "mpirun",
    )


def _from_slurm(env: Mapping[str, str]) -> Environment:
    rank, world = _rank_and_world(env, "SLURM_PROCID", "SLURM_NTASKS")
    local_world = slurm.tasks_of_a_node(env) or world
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
    # All tasks derive the same port from job and step; two jobs on one node get different ports.
    port = _FIRST_PORT + (_number(env, "SLURM_JOB_ID") * 7 + _number(env, "SLURM_STEP_ID")) % _PORTS
    return Environment(
        rank,
        world,
        _number(env, "SLURM_LOCALID"),
        local_world,
        env.get("MASTER_ADDR") or slurm.first_host(nodes),
        _number(env, "MASTER_PORT", port),
        "slurm",
    )
