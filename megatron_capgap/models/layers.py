"""Modules that Megatron-Core lacks: a LayerNorm that supports sequence parallelism, and parallel residual layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

_MARK = "sequence_parallel"


def mark_sequence_parallel(parameter: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Under sequence parallelism, makes Megatron add up the gradients of a parameter that is replicated over
    tensor-parallel ranks, each of which sees only its part of the sequence."""
    setattr(parameter, _MARK, config.sequence_parallel)


class LayerNorm(torch.nn.Module):
    """Mean and variance norm over the last dimension, with gain and bias.

    Both are replicated over tensor-parallel ranks. Under sequence parallelism each rank processes only its shard of the
    sequence; the attribute `sequence_parallel` makes Megatron sum their gradients over these ranks. Megatron's wrapper
    around torch's norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            mark_sequence_parallel(parameter, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`, with statistics in fp32 or wider."""
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.epsilon)


class ParallelResidualLayer(TransformerLayer):
    """A transformer layer with parallel residuals: `x + attention(norm(x)) + mlp(norm'(x))`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`[s, b, h]`, or `[s/tp, b, h]` under sequence parallelism, to the same shape; returns (output, None)."""
        kwargs.pop("dynamic_inference_decode_only", None)
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        branch = self.mlp(self.pre_mlp_layernorm(hidden_states))
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add(branch, attended, self.hidden_dropout), context
