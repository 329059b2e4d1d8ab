"""Default process group: init, destroy, abort; and the outcome file that a batch script reads."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_capgap.distributed import torchrun
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.distributed.rendezvous import report_rendezvous_problems

if TYPE_CHECKING:
    import torch.distributed as dist

    from megatron_capgap.devices import Device


def write_outcome(word: str) -> None:
    """Writes how this start of the run ended to the file named by CAPGAP_OUTCOME, for the calling script.

    Exit codes are not sufficient: torchrun returns 1 for all of them, and srun 143 if it has terminated the remaining
    ranks. Does nothing if the variable is not set.

    Args:
        word: `stopped` (saved before the end; the same command continues) or `refused` (a user error, which another
            start would repeat).
    """
    path = os.environ.get("CAPGAP_OUTCOME")
    if path:
        Path(path).write_text(f"{word}\n")


def init_process_group(environment: Environment, device: Device, timeout_seconds: int) -> dist.Store:
    """Creates the default process group and returns its store. Collective over all ranks.

    Args:
        environment: from `read_environment`.
        device: determines the backend (gloo or nccl).
        timeout_seconds: time-out of a collective, in seconds.

    Raises:
        UserError: the launcher's address is invalid.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        assert dist.get_world_size() == environment.world
        return dist.distributed_c10d._get_default_store()
    torchrun.drop_stale_agent_variables(environment)
    own_store = environment.world == 1 and not environment.joins_store
    waiting = nullcontext() if own_store else report_rendezvous_problems(environment, timeout_seconds)
    with reserved_port() if own_store else nullcontext(environment.master_port) as port, waiting:
        dist.init_process_group(
            device.backend,
            init_method=f"tcp://{environment.master_addr}:{port}",
            rank=environment.rank,
            world_size=environment.world,
            timeout=timedelta(seconds=timeout_seconds),
        )
    return dist.distributed_c10d._get_default_store()


def destroy_process_group() -> None:
    """Destroys the process groups; does nothing if there are none."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def abort(error: Exception) -> NoReturn:
    """Ends this process at once with an error's traceback, without destroying its process groups."""
    sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserves a free port of this host for a job's store until the `with` block ends.

    The reserving socket is bound but does not listen: the kernel gives the port to no other process, and torch's store,
    which sets SO_REUSEADDR, can listen on it.

    Yields:
        The port number.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
