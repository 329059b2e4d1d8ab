"""What SLURM says of a step's nodes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from megatron_capgap.common.errors import UserError

DIGITS = 18
"""More than any count of a launcher's has."""


def tasks_of_a_node(env: Mapping[str, str]) -> int | None:
    """Tasks on each node of the step; SLURM writes `4(x2)` for two nodes of four, `2,3` for two unequal ones.

    Raises:
        UserError: they are unequal, or no number.
    """
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    name = next((name for name in names if name in env), None)
    if name is None:
        return None
    tasks, _, repeated = env[name].partition("(")
    if not tasks.isdecimal() or len(tasks) > DIGITS or "," in repeated:
        raise UserError(
            f"environment variable {name} is {env[name][:40]!r}: every node must run as many ranks as the others; "
            "ask for them with --nodes and --ntasks-per-node instead of --ntasks"
        )
    return int(tasks)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list such as `gpu[07-09]`; SLURM itself knows best how to unfold it.

    Raises:
        UserError: it cannot.
    """
    if not nodes:
        return "127.0.0.1"
    if "[" not in nodes and "," not in nodes:
        return nodes
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"SLURM_NODELIST {nodes!r}: scontrol could not unfold it ({error}); set MASTER_ADDR yourself"
        ) from error
    return listing.stdout.split()[0]
