"""Whether torchrun's agent lives, whose store the ranks are to join."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from megatron_capgap.common.errors import UserError, in_one_line

if TYPE_CHECKING:
    from megatron_capgap.distributed.environment import Environment

_TRIES, _PAUSE_SECONDS, _KNOCK_SECONDS = 3, 1.0, 5.0
_JOINS = "TORCHELASTIC_USE_AGENT_STORE"
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def drop_stale_agent_variables(environment: Environment) -> None:
    """Looks whether the agent's store is there, which torchrun opens before it starts any rank; where this process is
    no rank of torchrun's, hides from torch what an earlier torchrun left in the environment.

    Raises:
        UserError: nothing listens where the store should be.
    """
    if not environment.joins_store:
        os.environ.pop(_JOINS, None)  # with it torch would wait for an agent's store
        return
    address, port = environment.master_addr, environment.master_port
    for left in reversed(range(_TRIES)):
        try:
            socket.create_connection((address, port), _KNOCK_SECONDS).close()
            return
        except (OSError, OverflowError, UnicodeError) as error:
            if left:
                time.sleep(_PAUSE_SECONDS)
                continue
            names = sorted(name for name in os.environ if name.startswith("TORCHELASTIC_") or name in _OF_RANKS)
            raise UserError(
                f"environment variable {_JOINS} is True, but no agent of torchrun's listens at {address} port {port} "
                f"({in_one_line(getattr(error, 'strerror', None) or error)}); start the ranks with torchrun, or unset "
                f"what an earlier one left: {' '.join(names)}"
            ) from None
