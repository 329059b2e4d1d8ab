"""Rendezvous diagnostics: name resolution and reachability of the master address."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.common.log import LOG

if TYPE_CHECKING:
    from megatron_capgap.distributed.environment import Environment

_FIRST_MESSAGE_SECONDS = 20.0
_CONNECT_SECONDS = 5.0
_TRIES = 3  # if the name server does not respond, which may be temporary


def _check_address(environment: Environment) -> None:
    """Refuses an invalid address before all ranks wait for it.

    Raises:
        UserError: the port is invalid, or the name cannot be resolved.
    """
    address, port = environment.master_addr, environment.master_port
    if not 0 < port < 1 << 16:
        raise UserError(
            f"environment variable MASTER_PORT is {port}; set it to a free port of rank 0's host, 1 to 65535"
        )
    for left in reversed(range(_TRIES)):
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (socket.gaierror, UnicodeError) as error:
            if getattr(error, "errno", None) == socket.EAI_AGAIN and left:
                time.sleep(1.0)
                continue
            raise UserError(
                f"environment variable MASTER_ADDR is {address!r}, which this host ({socket.gethostname()}) cannot "
                f"resolve ({in_one_line(getattr(error, 'strerror', None) or error)}); set it to the name or address "
                "of rank 0's host"
            ) from None


@contextmanager
def report_rendezvous_problems(environment: Environment, limit_seconds: float) -> Iterator[None]:
    """Prints the master address and whether it responds, while ranks wait for each other: after 20 seconds, then at
    doubling intervals.

    Args:
        environment: this process.
        limit_seconds: maximum duration of the wait, in seconds.

    Raises:
        UserError: the address is invalid.
    """
    _check_address(environment)
    done = threading.Event()
    # One rank per host, if LOCAL_RANK is known; with RANK alone each process may be on its own host.
    warns_for_host = environment.local_rank in (0, environment.rank)

    def warn_while_waiting() -> None:
        waited, pause = 0.0, _FIRST_MESSAGE_SECONDS
        while not done.wait(pause):
            waited, pause = waited + pause, 2 * pause
            line = _state(environment)
            if not done.is_set():
                LOG.warning(
                    f"rank {environment.rank} on {socket.gethostname()}: {line}; waiting for {waited:.0f} s, "
                    f"time-out after {limit_seconds:.0f} s"
                )

    thread = threading.Thread(target=warn_while_waiting, name="capgap-reach", daemon=True)
    if warns_for_host:
        thread.start()
    try:
        yield
    finally:
        done.set()


def _state(environment: Environment) -> str:
    """Whether the master address responds, as seen from this host."""
    place = f"{environment.master_addr} port {environment.master_port}"
    try:
        socket.create_connection((environment.master_addr, environment.master_port), _CONNECT_SECONDS).close()
    except OSError as error:
        return (
            f"no response at {place} yet ({in_one_line(error.strerror or error)}), the address of rank 0 "
            "in MASTER_ADDR and MASTER_PORT; check that rank 0 runs on that host and no firewall blocks this host"
        )
    return (
        f"{place} responds, but some of the {environment.world} ranks (WORLD_SIZE) have not connected; check that "
        "all are running with the same MASTER_ADDR and MASTER_PORT"
    )
