"""The section `student.recompute`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_capgap.config.types import STRICT, Positive


@dataclass(frozen=True)
class Recompute:
    """Activation recomputation: what the backward pass computes again instead of reading it from memory. Results are
    the same bit for bit; a step takes longer, by up to a third for whole layers."""

    __pydantic_config__ = STRICT

    what: Literal["full", "mlp"]
    """full: transformer layers, of which only the inputs are saved; mlp: their feed-forward layers only (families
    without linear biases)."""
    layers: Positive | None = None
    """Number of layers of each model chunk that are recomputed, the first ones, each from its own input; null: all.
    Only with what: full."""
    every: Positive = 1
    """Number of consecutive layers that are recomputed from one saved input; divides the layers of a model chunk. Only
    with what: full and layers: null."""
