"""Parameter counts and FLOPs of a model, in total and per rank, by arithmetic alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.schema import Layout, ModelShape


def padded_vocab(vocab: int, tensor: int) -> int:
    """Rows of embedding and LM head: the vocabulary rounded up so that all tensor-parallel ranks hold equally many."""
    return -(-vocab // tensor) * tensor


def _layer_matrices(shape: ModelShape) -> int:
    """Parameters of one layer's matrices: attention projections, gate (if gated), up and down."""
    query, key_value = shape.heads * derived.head_dim(shape), 2 * derived.kv_heads(shape) * derived.head_dim(shape)
    attention = shape.hidden * (query + key_value) + query * shape.hidden
    return attention + (3 if ARCHITECTURES[shape.family].gated else 2) * shape.hidden * shape.ffn


def _layer_cut_vectors(shape: ModelShape) -> int:
    """Parameters of one layer's biases that are sharded with their columns: queries, keys, values and up."""
    traits = ARCHITECTURES[shape.family]
    packed = (shape.heads + 2 * derived.kv_heads(shape)) * derived.head_dim(shape)
    biases = packed if traits.qkv_bias or traits.linear_bias else 0
    return biases + (shape.ffn if traits.linear_bias else 0)


def _norm_parameters(shape: ModelShape) -> int:
    """Parameters of one norm over the residual stream: a gain, and with LayerNorm a bias."""
    return shape.hidden * (2 if ARCHITECTURES[shape.family].norm == "LayerNorm" else 1)


def _layer_whole_vectors(shape: ModelShape) -> int:
    """Parameters of one layer that are replicated over tensor-parallel ranks: norms, and biases of the row-parallel
    projections."""
    traits = ARCHITECTURES[shape.family]
    biases = 2 * shape.hidden if traits.linear_bias else 0
    return 2 * _norm_parameters(shape) + biases + (2 * derived.head_dim(shape) if traits.qk_norm else 0)


def layer_parameters(shape: ModelShape) -> int:
    """Parameters of one transformer layer: matrices, biases and norms."""
    return _layer_matrices(shape) + _layer_cut_vectors(shape) + _layer_whole_vectors(shape)


def position_parameters(shape: ModelShape) -> int:
    """Parameters of learned positions."""
    return (shape.max_positions or 0) * shape.hidden if ARCHITECTURES[shape.family].learned_positions else 0


def embedding_parameters(shape: ModelShape) -> int:
    """Parameters of the input embedding, learned positions and, unless tied, the LM head; padding not counted."""
    return shape.vocab * shape.hidden * (1 if shape.tied_embeddings else 2) + position_parameters(shape)


def non_embedding_parameters(shape: ModelShape) -> int:
    """Parameters without embeddings and LM head: the model size in the law of capacity gap."""
    return shape.layers * layer_parameters(shape) + _norm_parameters(shape)


def kept_parameters(shape: ModelShape, groups: int, neurons: int) -> int:
    """Parameters without embeddings and LM head of a model whose layers are zero-padded to one shape; zeros excluded.

    Args:
        shape: the stored shape, the same for all layers.
        groups: key/value heads, with their queries, kept in all layers together.
        neurons: neurons kept in all layers together.
    """
    stored, width = derived.kv_heads(shape), derived.head_dim(shape)
    more = replace(shape, heads=shape.heads + shape.heads // stored, kv_heads=stored + 1, head_dim=width)
    a_group = layer_parameters(more) - layer_parameters(shape)
    a_neuron = layer_parameters(replace(shape, ffn=shape.ffn + 1)) - layer_parameters(shape)
    padding = (shape.layers * stored - groups) * a_group + (shape.layers * shape.ffn - neurons) * a_neuron
    return non_embedding_parameters(shape) - padding


def parameters(shape: ModelShape) -> int:
    """All parameters."""
    return non_embedding_parameters(shape) + embedding_parameters(shape)


def forward_flops(shape: ModelShape, sequence_length: int) -> float:
    """Floating-point operations of one token's forward pass: two per weight of a matrix product (including the LM head,
    excluding the embedding look-up), and the causal half of the attention scores."""
    matrices = shape.layers * _layer_matrices(shape) + shape.vocab * shape.hidden
    scores = shape.layers * 2 * shape.heads * derived.head_dim(shape) * sequence_length
    return 2.0 * matrices + scores


def stage_work(
    shape: ModelShape, layers: Sequence[int], sequence_length: int, teacher_head: tuple[int, int] | None = None
) -> list[float]:
    """Floating-point operations per token of each pipeline stage of a student: forward and backward pass of its layers;
    on the last one also of the LM head, and the teacher's LM head forward.

    Args:
        shape: the student.
        layers: number of layers of each stage.
        sequence_length: tokens in a row.
        teacher_head: (vocabulary, hidden size) of the teacher's LM head, if the loss computes its logits.
    """
    head = 2.0 * shape.vocab * shape.hidden
    layer = (forward_flops(shape, sequence_length) - head) / shape.layers
    work = [3.0 * layer * count for count in layers]
    work[-1] += 3.0 * head + (2.0 * teacher_head[0] * teacher_head[1] if teacher_head else 0.0)
    return work


def balanced_layers(
    shape: ModelShape, stages: int, sequence_length: int, teacher_head: tuple[int, int] | None = None
) -> list[int]:
    """Number of layers of each stage for which the fullest stage has the least work; arguments as of `stage_work`.

    Each layer after the first of every stage goes to the stage that has the least work so far; all layers are equal, so
    no other assignment has a lower maximum.
    """
    layers = [1] * stages
    for _ in range(shape.layers - stages):
        work = stage_work(shape, layers, sequence_length, teacher_head)
        layers[work.index(min(work))] += 1
    return layers


def training_flops(shape: ModelShape, teacher: ModelShape | None, sequence_length: int) -> float:
    """Floating-point operations of training on one token: 3 forward passes of the student and 1 of the teacher."""
    teaching = forward_flops(teacher, sequence_length) if teacher else 0.0
    return 3.0 * forward_flops(shape, sequence_length) + teaching


def lm_head_parameters(shape: ModelShape, layout: Layout) -> int:
    """Parameters of one tensor-parallel rank's shard of the LM head, or of the input embedding."""
    return padded_vocab(shape.vocab, layout.tensor) // layout.tensor * shape.hidden


def rank_parameters(shape: ModelShape, layout: Layout, stage: int, *, lm_head: bool = True) -> int:
    """Parameters on one rank of pipeline stage `stage`, with or without its LM head. Norms, learned positions and
    biases of row-parallel projections are replicated over tensor-parallel ranks."""
    sharded = (_layer_matrices(shape) + _layer_cut_vectors(shape)) // layout.tensor
    layer = sharded + _layer_whole_vectors(shape)
    count = derived.layers_on_stage(shape.layers, layout, stage) * layer
    rows = lm_head_parameters(shape, layout)
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        count += rows + position_parameters(shape)
    if last:
        count += _norm_parameters(shape)
        count += 0 if not lm_head or (shape.tied_embeddings and first) else rows
    return count
