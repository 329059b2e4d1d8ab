"""Nodes and tasks of a SLURM step."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from megatron_capgap.common.errors import UserError

DIGITS = 18
"""Maximum number of digits of a count set by a launcher."""


def tasks_of_a_node(env: Mapping[str, str]) -> int | None:
    """Tasks per node of the step; SLURM writes `4(x2)` for two nodes with four tasks each, `2,3` for unequal nodes.

    Raises:
        UserError: the counts differ between nodes, or are not numbers.
    """
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    name = next((name for name in names if name in env), None)
    if name is None:
        return None
    tasks, _, repeated = env[name].partition("(")
    if not tasks.isdecimal() or len(tasks) > DIGITS or "," in repeated:
        raise UserError(
            f"environment variable {name} is {env[name][:40]!r}: every node must run the same number of ranks; "
            "use --nodes and --ntasks-per-node instead of --ntasks"
        )
    return int(tasks)


def first_host(nodes: str) -> str:
    """First host of a SLURM node list such as `gpu[07-09]`, which scontrol expands.

    Raises:
        UserError: scontrol fails.
    """
    if not nodes:
        return "127.0.0.1"
    if "[" not in nodes and "," not in nodes:
        return nodes
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"SLURM_NODELIST {nodes!r}: scontrol could not expand it ({error}); set MASTER_ADDR") from error
    return listing.stdout.split()[0]
