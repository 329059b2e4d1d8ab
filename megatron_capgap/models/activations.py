"""Activations that transformer layers save for the backward pass, by arithmetic alone. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.schema import Layout, ModelShape


@dataclass(frozen=True)
class LayerActivations:
    """Bytes per token of each tensor that one layer saves."""

    outside_mlp: list[int]
    """Norms and attention, and the input of the feed-forward layer."""
    mlp: list[int]
    """Inside the feed-forward layer."""

    @property
    def all(self) -> list[int]:
        """Of the whole layer."""
        return self.outside_mlp + self.mlp


def of_layer(shape: ModelShape, layout: Layout, width: int, recipe: str | None = None) -> LayerActivations:
    """What one layer saves for the backward pass.

    Input and output of both norms; the packed queries, keys and values; queries and keys after rotation; under context
    parallelism the gathered keys and values; the attention's output; gate and up, or up alone; the activation's output.
    With QK norms also their inputs. In FP8 a linear saves its cast input, and nothing else is saved of norms and
    activation. The attention saves its own output; recipes other than delayed save a cast copy of it as well.

    Args:
        shape, layout: give the tensors' sizes.
        width: bytes of the compute dtype.
        recipe: FP8 recipe of the layer; None without FP8.
    """
    traits = ARCHITECTURES[shape.family]
    query, key_value = shape.heads * derived.head_dim(shape), derived.kv_heads(shape) * derived.head_dim(shape)
    inner = [query + 2 * key_value, query, key_value, query]
    inner += [2 * layout.context * key_value] if layout.context > 1 else []  # keys and values of the whole sequence
    inner += [query, key_value] if traits.qk_norm else []
    hidden, tensor = shard_numel(shape.hidden, layout), layout.tensor
    cast = width if recipe is None else 1
    outside = [number * width for number in (hidden, hidden, *(number // tensor for number in inner))]
    outside += [hidden * cast] * 2 + ([query // tensor] if recipe == "delayed" else [])
    neurons = shape.ffn // tensor
    return LayerActivations(outside, [(2 if traits.gated else 1) * neurons * width, neurons * cast])


def at_peak(
    layer: LayerActivations, layer_input: int, layers: int, chunk_layers: int, recompute: Recompute | None
) -> list[int]:
    """Bytes per token of each tensor that is saved when the backward pass begins; what is recomputed is counted apart,
    by `recomputed`.

    Args:
        layer: what one layer saves.
        layer_input: bytes per token of a layer's input.
        layers: layers in flight, from `layers_in_flight`.
        chunk_layers: layers of a model chunk.
        recompute: what is recomputed.
    """
    if recompute is not None and recompute.what == "mlp":
        return layer.outside_mlp * layers
    again = layers_recomputed(layers, chunk_layers, recompute)
    every = 1 if recompute is None else recompute.every
    return layer.all * (layers - again) + [layer_input] * math.ceil(again / every)


def recomputed(layer: LayerActivations, recompute: Recompute | None) -> list[int]:
    """Bytes per token of each tensor of the layers that are recomputed together: their activations are there while
    their backward pass runs."""
    if recompute is None:
        return []
    return layer.mlp if recompute.what == "mlp" else layer.all * recompute.every


def layers_recomputed(layers: int, chunk_layers: int, recompute: Recompute | None) -> int:
    """Number of `layers` layers in flight that are recomputed whole."""
    if recompute is None or recompute.what != "full":
        return 0
    return layers if recompute.layers is None else layers * min(recompute.layers, chunk_layers) // chunk_layers


def layers_in_flight(layout: Layout, num_microbatches: int, pipeline_rank: int, layers: int) -> int:
    """Maximum of layers times micro-batches between forward and backward pass on one stage.

    1F1B holds one micro-batch for this stage and each later one. The interleaved schedule holds chunks of layers: two
    for each later stage, one round for each further virtual stage, and the current one.
    """
    behind = layout.pipeline - pipeline_rank
    on_stage = derived.layers_on_stage(layers, layout, pipeline_rank)
    if layout.virtual_pipeline == 1:
        return min(behind, num_microbatches) * on_stage
    chunks = 2 * (behind - 1) + (layout.virtual_pipeline - 1) * layout.pipeline + 1
    return min(chunks, num_microbatches * layout.virtual_pipeline) * on_stage // layout.virtual_pipeline


def shard_numel(hidden: int, layout: Layout) -> int:
    """Elements per token of the residual stream on one rank: hidden / tp under sequence parallelism, as the sequence is
    sharded."""
    return hidden // layout.tensor if layout.sequence else hidden
