"""Checks that torchrun's agent, whose store the ranks join, is alive."""

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
_USE_AGENT_STORE, _RUN_ID = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def drop_stale_agent_variables(environment: Environment) -> None:
    """Checks that the agent's store is reachable, which torchrun opens before it starts a rank. If this process is not
    a rank of torchrun, hides from torch what an earlier torchrun left in the environment.

    Raises:
        UserError: nothing listens at the store's address, or the listener does not belong to an agent above this
            process.
    """
    if not environment.joins_store:
        os.environ.pop(_USE_AGENT_STORE, None)  # otherwise torch would wait for an agent's store
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
                f"environment variable {_USE_AGENT_STORE} is True, but no torchrun agent listens at {address} "
                f"port {port} ({in_one_line(getattr(error, 'strerror', None) or error)}); {_remedy()}"
            ) from None
    of_first_agent = os.environ.get("GROUP_RANK", str(environment.rank)) == "0"
    if of_first_agent and (parent := _parent_that_is_no_agent(port)):
        raise UserError(
            f"environment variable {_USE_AGENT_STORE} is True, but the process that started this one, {parent}, is not "
            f"the torchrun agent with the store at {address} port {port}, which may belong to another job; {_remedy()}"
        )


def _remedy() -> str:
    names = sorted(name for name in os.environ if name.startswith("TORCHELASTIC_") or name in _RANK_VARIABLES)
    return f"start the ranks with torchrun, or unset the variables of an earlier one: {' '.join(names)}"


def _parent_that_is_no_agent(port: int) -> str | None:
    """The ancestor process that should be the agent but is not; None if this cannot be determined.

    The agent is the nearest ancestor whose environment lacks the run's variables. The agent of the first ranks hosts
    the store or is its client; programs between agent and rank were started with the variables.
    """
    try:
        for process in _ancestors(Path("/proc/self")):
            if _has_socket_on_port(process, port):
                return None
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"{_RUN_ID}={os.environ.get(_RUN_ID)}".encode() not in variables:
                return f"{(process / 'comm').read_text().strip()} ({process.name})"
    except (OSError, ValueError, IndexError):  # another user's process, an ended process, or another operating system
        pass
    return None


def _ancestors(process: Path) -> Iterator[Path]:
    """Ancestors of a process, nearest first."""
    while True:
        # The process name is in parentheses and may contain any character.
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        if parent == "0":
            return
        process = Path("/proc") / parent
        yield process


def _has_socket_on_port(process: Path, port: int) -> bool:
    """Whether a process listens on a port, or has a connection to or from it."""
    places = set()
    for table in ("tcp", "tcp6"):
        file = process / "net" / table
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            _, local, remote, *others = line.split()
            if port in (int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16)):
                places.add(f"socket:[{others[6]}]")
    return any(os.readlink(one) in places for one in (process / "fd").iterdir())
