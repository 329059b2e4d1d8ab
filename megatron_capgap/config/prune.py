"""The section of the stage prune; `schema` puts it beside the others."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from megatron_capgap.config.types import STRICT, Positive


@dataclass(frozen=True)
class PruneConfig:
    """The student that is cut out of the teacher: its size as numbers, as a sparsity or as a count of parameters."""

    __pydantic_config__ = STRICT

    layers: Positive | None = None
    """Transformer layers that stay; null means all."""
    hidden: Positive | None = None
    """Channels of the residual stream that stay, the same ones in all layers; null means all."""
    heads: Positive | None = None
    """Attention heads that stay in each layer; null means all, or with kv_heads given the queries of those groups."""
    kv_heads: Positive | None = None
    """Key/value heads that stay in each layer; null keeps as many queries to a group as the teacher has."""
    ffn: Positive | None = None
    """Neurons of the feed-forward layer that stay in each layer; null means all."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each layer's weights that goes, in place of hidden, heads and ffn: each of them loses
    1 - sqrt(1 - sparsity), for the weights lie between two of them."""
    parameters: Positive | None = None
    """Parameters of the student without embeddings, in place of hidden, heads and ffn: the nearest shape in which these
    are cut by one share."""
    multiple: Positive = 8
    """sparsity and parameters choose a hidden and an ffn that are multiples of this."""
    per_layer: bool = False
    """Whether layers may keep different numbers of key/value heads and of neurons: these are ranked over all layers at
    once, by scores that each layer's L2 norm divides. heads, kv_heads and ffn are then means over layers, sparsity and
    parameters speak of all layers together; one head and one unit of neurons stay everywhere. All layers store what the
    largest one keeps, rounded up to what student.layout divides and the family holds: zeros, which stay zero in
    training. They change no result, but are stored and multiplied with."""
    importance: Literal["gradient", "activation"] = "gradient"
    """What a part is worth. gradient: |d loss / d mask|, the mean over micro-batches of the loss of each; activation,
    forward only: what heads and neurons send into the residual stream (size times outgoing weights), and the size of
    each channel behind the norms."""
    batches: Positive = 16
    """Global batches of data.train that the parts are scored on."""
    layers_by: Literal["position", "importance"] = "position"
    """position: the middle layers stay, as many go at either end; importance: those worth most stay."""
