"""Options of `--check` and `--plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_capgap.common.errors import UserError

UTILISATION = 0.4
"""Assumed share of the peak that matrix products reach: what good runs of this size reach (docs/planning.md)."""


@dataclass(frozen=True)
class PlanningOptions:
    """What a plan is made for."""

    gpu: str | None
    """Name or GiB; None: none given."""
    utilisation: float | None
    """Share of the peak reached while a rank computes; None: `UTILISATION`, as an assumption."""
    gpu_hour_price: float | None
    """Price of one GPU for one hour, in any currency."""
    ranks: int | None
    """Number of GPUs to search layouts for; None: the configured layout is checked."""


def parse(options: Mapping[str, str]) -> PlanningOptions | None:
    """The options among those of the command line; None if there are none.

    Raises:
        UserError: a value is not a number, or out of range.
    """
    if not {"--gpu", "--utilisation", "--gpu-hour-price", "--plan"} & options.keys():
        return None
    ranks = options.get("--plan")
    if ranks is not None and not (ranks.isdecimal() and int(ranks) > 0):
        raise UserError(f"--plan: {ranks} given; expected the number of GPUs, an integer > 0")
    return PlanningOptions(
        options.get("--gpu"),
        _number(options, "--utilisation", 1.0),
        _number(options, "--gpu-hour-price", float("inf")),
        None if ranks is None else int(ranks),
    )


def _number(options: Mapping[str, str], name: str, most: float) -> float | None:
    given = options.get(name)
    if given is None:
        return None
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value <= most or value == float("inf"):
        limit = " and <= 1, for example 0.4" if most == 1 else ""
        raise UserError(f"{name}: {given} given; expected a number > 0{limit}")
    return value
