"""Whether torchrun's agent lives, whose store the ranks are to join."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_capgap.common.errors import UserError, in_one_line

if TYPE_CHECKING:
    from megatron_capgap.distributed.environment import Environment

_TRIES, _PAUSE_SECONDS, _KNOCK_SECONDS = 3, 1.0, 5.0
_JOINS, _RUN = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def drop_stale_agent_variables(environment: Environment) -> None:
    """Looks whether the agent's store is there, which torchrun opens before it starts any rank; where this process is
    no rank of torchrun's, hides from torch what an earlier torchrun left in the environment.

    Raises:
        UserError: nothing listens where the store should be, or something that no agent above this process has to do
            with.
    """
    if not environment.joins_store:
        os.environ.pop(_JOINS, None)  # with it torch would wait for an agent's store
        return
    address, port = environment.master_addr, environment.master_port
    for left in reversed(range(_TRIES)):
        try:
            socket.create_connection((address, port), _KNOCK_SECONDS).close()
            break
        except (OSError, OverflowError, UnicodeError) as error:
            if left:
                time.sleep(_PAUSE_SECONDS)
                continue
            raise UserError(
                f"environment variable {_JOINS} is True, but no agent of torchrun's listens at {address} port {port} "
                f"({in_one_line(getattr(error, 'strerror', None) or error)}); {_remedy()}"
            ) from None
    of_first_agent = os.environ.get("GROUP_RANK", str(environment.rank)) == "0"
    if of_first_agent and (parent := _no_agent(port)):
        raise UserError(
            f"environment variable {_JOINS} is True, but the process that has started this one, {parent}, is no agent "
            f"of torchrun's with the store at {address} port {port}, which may be another job's; {_remedy()}"
        )


def _remedy() -> str:
    names = sorted(name for name in os.environ if name.startswith("TORCHELASTIC_") or name in _OF_RANKS)
    return f"start the ranks with torchrun, or unset what an earlier one left: {' '.join(names)}"


def _no_agent(port: int) -> str | None:
    """The process above this one that should be the agent and is none; None where that cannot be told.

    The agent is the first whose own environment does not have the run's variables. That of the first ranks keeps the
    store or is its client; programs that stand between it and a rank were started with the variables.
    """
    try:
        for process in _above(Path("/proc/self")):
            if _speaks_at(process, port):
                return None
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"{_RUN}={os.environ.get(_RUN)}".encode() not in variables:
                return f"{(process / 'comm').read_text().strip()} ({process.name})"
    except (OSError, ValueError, IndexError):  # it is another user's or has ended, or the system is another one
        pass
    return None


def _above(process: Path) -> Iterator[Path]:
    """The processes above one, the nearest first."""
    while True:
        # The name may hold anything, and stands in parentheses.
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        if parent == "0":
            return
        process = Path("/proc") / parent
        yield process


def _speaks_at(process: Path, port: int) -> bool:
    """Whether a process listens at a port, or is connected with one of this number."""
    places = set()
    for table in ("tcp", "tcp6"):
        file = process / "net" / table
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            _, local, remote, *others = line.split()
            if port in (int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16)):
                places.add(f"socket:[{others[6]}]")
    return any(os.readlink(one) in places for one in (process / "fd").iterdir())
