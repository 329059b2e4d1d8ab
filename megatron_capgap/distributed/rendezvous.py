"""Whether the ranks can find each other: the name of the first one's host, and what answers at its port."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_capgap.common.errors import UserError, in_one_line

if TYPE_CHECKING:
    from megatron_capgap.distributed.environment import Environment

_FIRST_MESSAGE_SECONDS = 20.0
_CONNECT_SECONDS = 5.0
_TRIES = 3  # where the name server gave no answer, which may pass


def _check_address(environment: Environment) -> None:
    """Refuses an address that no rank can reach, before all of them wait for it.

    Raises:
        UserError: the port is none, or the name does not resolve.
    """
    address, port = environment.master_addr, environment.master_port
    if not 0 < port < 1 << 16:
        raise UserError(f"environment variable MASTER_PORT is {port}; a port of the first rank's host, 1 to 65535")
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
                f"resolve ({in_one_line(getattr(error, 'strerror', None) or error)}); give the name or address of the "
                "host on which rank 0 runs"
            ) from None


@contextmanager
def report_rendezvous_problems(environment: Environment, limit_seconds: float) -> Iterator[None]:
    """While the ranks wait for each other at the launcher's address, says where that is and what answers there: after
    20 seconds, and then after twice as long each time.

    Args:
        environment: this process.
        limit_seconds: how long the wait lasts at most.

    Raises:
        UserError: no rank can reach that address.
    """
    _check_address(environment)
    done = threading.Event()
    # One of each host, where the launcher says which; with RANK alone each process may be on a host of its own.
    speaks = environment.local_rank in (0, environment.rank)

    def tell() -> None:
        waited, pause = 0.0, _FIRST_MESSAGE_SECONDS
        while not done.wait(pause):
            waited, pause = waited + pause, 2 * pause
            line = _state(environment)
            if not done.is_set():
                sys.stderr.write(
                    f"capgap: warning: rank {environment.rank} on {socket.gethostname()}: {line}; waiting for "
                    f"{waited:.0f} s, for {limit_seconds:.0f} s at most\n"
                )
                sys.stderr.flush()

    thread = threading.Thread(target=tell, name="capgap-reach", daemon=True)
    if speaks:
        thread.start()
    try:
        yield
    finally:
        done.set()


def _state(environment: Environment) -> str:
    """What is to be seen of the first rank from here."""
    place = f"{environment.master_addr} port {environment.master_port}"
    try:
        socket.create_connection((environment.master_addr, environment.master_port), _CONNECT_SECONDS).close()
    except OSError as error:
        return (
            f"nothing answers at {place} yet ({in_one_line(error.strerror or error)}), where MASTER_ADDR and "
            "MASTER_PORT say that rank 0 is; is it running, on that host, and lets a firewall this host through?"
        )
    return (
        f"{place} answers, but not all of the {environment.world} ranks that WORLD_SIZE says have come; are all "
        "running, with the same MASTER_ADDR and MASTER_PORT?"
    )
