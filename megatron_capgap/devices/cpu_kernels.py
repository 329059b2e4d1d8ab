"""The fused kernels that Megatron-Core looks for and a CPU lacks: rotary positions and SwiGLU, in few passes of memory.

Written with torch's operators, each formula costs a temporary and a pass over it; these write every result once, into
the tensor that is returned. Both sit where Megatron looks up its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def install() -> None:
    """Puts them in their places, for the life of the process."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models.common.embeddings import rope_utils

    fused_bias_swiglu.swiglu, fused_bias_swiglu.swiglu_back = swiglu, swiglu_back
    rope_utils.fused_apply_rotary_pos_emb = apply_rotary


def swiglu(inputs: Tensor) -> Tensor:
    """silu(gate) * up of `[..., 2 f]`, which holds gate beside up, to `[..., f]`."""
    gate, up = inputs.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_back(gradient: Tensor, inputs: Tensor) -> Tensor:
    """The gradient `[..., 2 f]` of what went into `swiglu`, from that of its result `[..., f]`."""
    gate, up = inputs.chunk(2, -1)
    result = torch.empty_like(inputs)
    of_gate, of_up = result.chunk(2, -1)
    torch.ops.aten.silu.out(gate, out=of_up).mul_(gradient)
    torch.mul(gradient, up, out=of_gate)
    torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
    return result


def apply_rotary(heads: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Turns pairs of columns (i, i + r/2) of each head by an angle of their position: RoPE (Su et al., 2021).

    Args:
        heads: `[s, b, heads, d]`, queries or keys.
        angles: `[s, 1, 1, r]` in radians, the same for both of a pair; columns from r <= d on stay as they are.
        interleaved: must be False: the two of a pair are half of r apart, as in every family here.
    """
    assert not interleaved
    half = angles.shape[-1] // 2
    cosines = torch.nn.functional.pad(angles.cos(), (0, heads.shape[-1] - 2 * half), value=1.0)
    return _Rotary.apply(heads, cosines.to(heads.dtype), angles[..., :half].sin().to(heads.dtype))


class _Rotary(torch.autograd.Function):
    """The gradient turns the other way. Kept are cosines `[s, 1, 1, d]` and sines `[s, 1, 1, r/2]` alone."""

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
