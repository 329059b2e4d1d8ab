"""Projections from the student's hidden size to the teacher's: trained and saved with a model, not part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_capgap.config.schema import LayerPair
from megatron_capgap.models.gpt import HiddenStateModel, unwrap
from megatron_capgap.models.layers import mark_sequence_parallel

PREFIX = "projections."
"""Prefix of their keys in a checkpoint."""


class Projection(torch.nn.Module):
    """A bias-free linear map, replicated over the tensor-parallel ranks.

    Under sequence parallelism each rank processes only its shard of the sequence; the attribute `sequence_parallel`
    makes Megatron sum the gradient over these ranks, as it does for norms.
    """

    def __init__(self, student_width: int, teacher_width: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(teacher_width, student_width, dtype=config.params_dtype))
        mark_sequence_parallel(self.weight, config)


def add(chunks: Sequence[torch.nn.Module], pairs: Sequence[LayerPair], teacher_width: int) -> None:
    """Adds a projection, not yet initialised, for each student layer of `pairs` to the chunk that holds the layer.

    Args:
        chunks: this rank's, not yet wrapped in DDP.
        pairs: of the whole run.
        teacher_width: the teacher's hidden size.
    """
    for model in map(unwrap, chunks):
        held = {layer.layer_number for layer in model.decoder.layers}
        for pair in pairs:
            if pair.student_layer in held:
                model.projections[pair.name] = Projection(model.config.hidden_size, teacher_width, model.config)
        model.projections.to(next(model.parameters()).device)


def weight_of(model: HiddenStateModel, pair: LayerPair) -> torch.nn.Parameter | None:
    """The weight `[h_teacher, h]` of a pair's projection; None where the widths are the same."""
    if pair.name not in model.projections:
        return None
    projection = model.projections[pair.name]
    assert isinstance(projection, Projection), "`add` alone puts something there"
    return projection.weight
