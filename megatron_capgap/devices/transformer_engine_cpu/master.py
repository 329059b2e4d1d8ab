"""FP8 parameters: casts of a rank's slice of the master weights, for Megatron's distributed optimizer.

A slice is `[n]`, and starts at `start_offset` of the flattened weight `[h, w]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_capgap.devices.transformer_engine_cpu.formats import FLOAT_MAX, FORMATS, DType, scale_from_amax
from megatron_capgap.devices.transformer_engine_cpu.quantize import BLOCK


def multi_tensor_scale(chunk_size: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """Extension function: writes each tensor of the first list times `scale` into its partner in the second list."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int, noop: Tensor, lists: list[list[Tensor]], max_fp8: float, force_pow_2_scales: bool, epsilon: float
) -> None:
    """Extension function: computes scales (second list) and their inverses (third) from maxima (first), in place."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_from_amax(amax, max_fp8, epsilon, force_pow_2_scales, FLOAT_MAX))
        inverse.copy_(1.0 / scale)


def _tile_of(h: int, w: int, start_offset: int, count: int) -> tuple[Tensor, Tensor]:
    """Row and column of the tile that each element of a slice belongs to."""
    place = torch.arange(start_offset, start_offset + count)
    assert start_offset + count <= h * w
    return place.div(w, rounding_mode="floor") // BLOCK, place % w // BLOCK


@torch.no_grad()
def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Extension function: maxima of the part of each 128 x 128 tile within the slice; 0 for tiles outside it."""
    rows, columns = _tile_of(h, w, start_offset, tensor.numel())
    magnitudes = tensor.reshape(-1).float().abs().nan_to_num(nan=0.0, posinf=float("inf"))
    tiles = torch.zeros(amax.numel())
    tiles.scatter_reduce_(0, rows * amax.shape[1] + columns, magnitudes, "amax")
    amax.copy_(tiles.view(amax.shape))


@torch.no_grad()
def fp8_block_scaling_partial_cast(
    inp: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start_offset: int, block_len: int, out_dtype: Any
) -> None:
    """Extension function: writes the slice's codes, with the scale of their 128 x 128 tile, to `out` (uint8 `[n]`)."""
    rows, columns = _tile_of(h, w, start_offset, inp.numel())
    out.copy_(FORMATS[DType(out_dtype)].cast(inp.reshape(-1), scale[rows, columns]).view(out.shape))
