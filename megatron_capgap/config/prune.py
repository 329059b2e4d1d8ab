"""Configuration section prune."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from megatron_capgap.config.types import STRICT, Positive


@dataclass(frozen=True)
class PruneConfig:
    """Size of the pruned student: as dimensions, as a sparsity or as a parameter count."""

    __pydantic_config__ = STRICT

    layers: Positive | None = None
    """Transformer layers to keep; null: all."""
    hidden: Positive | None = None
    """Channels of the residual stream to keep, the same ones in all layers; null: all."""
    heads: Positive | None = None
    """Attention (query) heads to keep per layer; null: all, or if kv_heads is set, the query heads of the kept
    groups."""
    kv_heads: Positive | None = None
    """Key/value heads to keep per layer; null: keep the teacher's number of query heads per group."""
    ffn: Positive | None = None
    """Feed-forward neurons to keep per layer; null: all."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of each layer's weights to remove; replaces hidden, heads and ffn. Each of these dimensions shrinks by
    the fraction 1 - sqrt(1 - sparsity), because every weight matrix spans two of them."""
    parameters: Positive | None = None
    """Target number of non-embedding parameters; replaces hidden, heads and ffn. Selects the nearest shape in which
    these dimensions shrink by the same fraction."""
    multiple: Positive = 8
    """sparsity and parameters choose hidden and ffn as multiples of this number."""
    per_layer: bool = False
    """Whether layers may keep different numbers of key/value heads and neurons. Scores are normalised by each layer's
    L2 norm and ranked over all layers; heads, kv_heads and ffn are then means over layers, and sparsity and parameters
    apply to all layers together. Every layer keeps at least one head and one unit of neurons. All layers store the size
    of the largest, rounded up to what student.layout and the family require; the rest is zero and stays zero in
    training. Zeros do not change results but use memory and compute."""
    importance: Literal["gradient", "activation"] = "gradient"
    """Importance score. gradient: |d loss / d mask|, averaged over micro-batches; activation (forward only): for heads
    and neurons, activation magnitude times outgoing weight norm; for channels, activation magnitude after the norms."""
    batches: Positive = 16
    """Global batches of data.train used to compute the scores."""
    layers_by: Literal["position", "importance"] = "position"
    """Which layers to keep. position: the middle layers, removing equally many at both ends; importance: those with the
    highest scores."""
