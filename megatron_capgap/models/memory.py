"""Bytes that a run needs on its fullest rank, by arithmetic alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_capgap.config import derive
from megatron_capgap.config.schema import Config, Layout, ModelShape
from megatron_capgap.models import size

_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    teacher_weights: int = 0
    teacher_hidden: int = 0
    loss: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def estimate(config: Config, stage: str, student: ModelShape, teacher: ModelShape | None, world: int) -> Memory:
    """The fullest rank of a run."""
    return Memory()
