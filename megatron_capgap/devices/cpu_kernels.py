"""CPU versions of Megatron-Core's fused kernels for rotary positions and SwiGLU, with few passes over memory.

With plain torch operators each operation creates a temporary and makes a pass over it; these functions write each
result once, into the returned tensor. They are installed where Megatron looks up its own kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def install() -> None:
    """Installs both kernels in Megatron, for the life of the process."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models.common.embeddings import rope_utils

    fused_bias_swiglu.swiglu, fused_bias_swiglu.swiglu_back = swiglu, swiglu_back
    rope_utils.fused_apply_rotary_pos_emb = apply_rotary


def swiglu(inputs: Tensor) -> Tensor:
    """silu(gate) * up: `[..., 2 f]`, gate followed by up, to `[..., f]`."""
    gate, up = inputs.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_back(gradient: Tensor, inputs: Tensor) -> Tensor:
    """The gradient `[..., 2 f]` of `swiglu`'s input, from that of its output `[..., f]`."""
    gate, up = inputs.chunk(2, -1)
    result = torch.empty_like(inputs)
    of_gate, of_up = result.chunk(2, -1)
    torch.ops.aten.silu.out(gate, out=of_up).mul_(gradient)
    torch.mul(gradient, up, out=of_gate)
    torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
    return result


def apply_rotary(heads: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """RoPE (Su et al., 2021): rotates the column pairs (i, i + r/2) of each head by position-dependent angles.

    Args:
        heads: `[s, b, heads, d]`, queries or keys.
        angles: `[s, 1, 1, r]` in radians, r <= d, equal for both columns of a pair; columns from r on are unchanged.
        interleaved: must be False: the columns of a pair are r/2 apart, as in every supported family.
    """
    assert not interleaved
    half = angles.shape[-1] // 2
    cosines = torch.nn.functional.pad(angles.cos(), (0, heads.shape[-1] - 2 * half), value=1.0)
    return _Rotary.apply(heads, cosines.to(heads.dtype), angles[..., :half].sin().to(heads.dtype))


class _Rotary(torch.autograd.Function):
    """Rotation; the backward pass rotates in the opposite direction. Saves only cosines `[s, 1, 1, d]` and sines
    `[s, 1, 1, r/2]`."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(heads, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turned(gradient, cosines, -sines), None, None


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = sines.shape[-1]
    first, second = slice(half), slice(half, 2 * half)
    turned = heads * cosines
    turned[..., first].addcmul_(heads[..., second], sines, value=-1)
    turned[..., second].addcmul_(heads[..., first], sines)
    return turned
