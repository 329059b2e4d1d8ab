"""Linear maps from the student's width to the teacher's: they are trained and saved with a model, and no part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_capgap.config.schema import LayerPair
from megatron_capgap.models.gpt import HiddenStateModel, unwrap
from megatron_capgap.models.layers import mark_sequence_parallel

PREFIX = "projections."
"""What their keys in a checkpoint begin with."""


class Projection(torch.nn.Module):
    """A bias-free linear map, replicated over the tensor-parallel ranks.

    Under sequence parallelism each rank sees only its part of the sequence; the mark `sequence_parallel` makes
    Megatron add up the gradient over them, as it does for norms.
    """

    def __init__(self, student_width: int, teacher_width: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(teacher_width, student_width, dtype=config.params_dtype))
        mark_sequence_parallel(self.weight, config)


def add(chunks: Sequence[torch.nn.Module], pairs: Sequence[LayerPair], teacher_width: int) -> None:
    """Gives the chunks that hold the student layers of `pairs` a projection for each, not yet filled.

    Args:
        chunks: this rank's, not yet wrapped.
        pairs: of the whole run.
        teacher_width: width of the teacher's residual stream.
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
