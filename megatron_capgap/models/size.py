"""What a model weighs, by arithmetic alone: parameters, FLOPs and bytes a rank. No torch."""

from __future__ import annotations

from megatron_capgap.config.schema import Layout, ModelShape


def head_dim(shape: ModelShape) -> int:
    """Width of one attention head."""
    return shape.head_dim or shape.hidden // shape.heads


def kv_heads(shape: ModelShape) -> int:
    """Number of key/value heads (query groups)."""
    return shape.kv_heads or shape.heads


def padded_vocab(vocab: int, tensor: int) -> int:
    """Rows of embedding and LM head: the vocabulary rounded up so that every tensor-parallel rank holds as many."""
    return -(-vocab // tensor) * tensor


def layer_parameters(shape: ModelShape) -> int:
    """Parameters of one transformer layer: attention projections, gate, up and down, two norms."""
    query, key_value = shape.heads * head_dim(shape), 2 * kv_heads(shape) * head_dim(shape)
    attention = shape.hidden * (query + key_value) + query * shape.hidden
    return attention + 3 * shape.hidden * shape.ffn + 2 * shape.hidden


def embedding_parameters(shape: ModelShape) -> int:
    """Parameters of the input embedding and, unless tied, the LM head; padding not counted."""
    return shape.vocab * shape.hidden * (1 if shape.tied_embeddings else 2)


def non_embedding_parameters(shape: ModelShape) -> int:
    """Parameters without input embedding and LM head: the size that the law of capacity gap speaks of."""
    return shape.layers * layer_parameters(shape) + shape.hidden


def parameters(shape: ModelShape) -> int:
    """All parameters."""
    return non_embedding_parameters(shape) + embedding_parameters(shape)


def forward_flops(shape: ModelShape, sequence_length: int) -> float:
    """Floating-point operations of one token's forward pass: two for each weight of a matrix product (the LM head
    included, the embedding look-up not), and the causal half of the attention scores."""
    matrices = shape.layers * (layer_parameters(shape) - 2 * shape.hidden) + shape.vocab * shape.hidden
    scores = shape.layers * 2 * shape.heads * head_dim(shape) * sequence_length
    return 2.0 * matrices + scores


def training_flops(shape: ModelShape, teacher: ModelShape | None, sequence_length: int) -> float:
    """Floating-point operations of training on one token: 3 forward passes of the student, 1 of the teacher."""
    teaching = forward_flops(teacher, sequence_length) if teacher else 0.0
    return 3.0 * forward_flops(shape, sequence_length) + teaching


def rank_parameters(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Parameters that one rank of pipeline stage `stage` holds; norms are replicated over tensor-parallel ranks."""
    layer = (layer_parameters(shape) - 2 * shape.hidden) // layout.tensor + 2 * shape.hidden
    count = shape.layers // layout.pipeline * layer
    rows = padded_vocab(shape.vocab, layout.tensor) // layout.tensor * shape.hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        count += rows
    if last:
        count += shape.hidden
        count += 0 if shape.tied_embeddings and first else rows
    return count
