"""Quantisers of the four recipes: conversion between high precision and Transformer Engine's quantised tensors.

A quantised tensor is described by its buffers, a dictionary from attribute names of Transformer Engine's classes to
tensors or None. `[m, k]` is the matrix obtained by flattening all but the last dimension of a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_capgap.devices.transformer_engine_cpu.formats import (
    FLOAT_MAX,
    FORMATS,
    NAMES,
    TORCH_DTYPES,
    DType,
    Format,
    largest_magnitude,
    reciprocal_of_exponent,
    scale_from_amax,
    shared_exponent,
    value_of_exponent,
)

BLOCK = 128
MX_BLOCK = 32

Buffers = dict[str, Tensor | None]


@torch.no_grad()
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Extension function: casts `tensor` with `quantizer`, into `output` if given.

    Args:
        tensor: `[..., k]`, local shard, any floating dtype.
        quantizer: one of Transformer Engine's four FP8 quantisers; selects the copies (rowwise, columnwise).
        output: a quantised tensor to overwrite.
        noop: one number; unless 0, `output` is left unchanged.

    Returns:
        A quantised tensor of the class that belongs to the quantiser.
    """
    if output is not None and noop is not None and noop.item() != 0:
        return output
    return store(buffers(tensor, quantizer), tensor.shape, tensor.dtype, quantizer, output)


def store(parts: Buffers, shape: torch.Size, dtype: torch.dtype, quantizer: Any, output: Any = None) -> Any:
    """Stores buffers in a new quantised tensor with nominal `shape` and `dtype`, or in `output`, in place."""
    if output is not None:
        for name, value in parts.items():
            present = getattr(output, name)
            if value is None or present is None or present.shape != value.shape:
                setattr(output, name, value)
            else:
                present.copy_(value)
        output._fp8_dtype = quantizer.dtype
        return output
    kind = _kind(quantizer)
    storage, tensor, keywords = _classes(kind)
    named: dict[str, object] = {keywords.get(name, name[1:]): value for name, value in parts.items()}
    named |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if kind == "Float8BlockQuantizer":
        named |= {"is_2D_scaled": quantizer.block_scaling_dim == 2}
    if kind == "MXFP8Quantizer":
        # The emulated GEMMs read scales in plain order, whatever the quantiser requests.
        named |= {"with_gemm_swizzled_scales": False}
    if quantizer.internal:
        return storage(fake_dtype=dtype, **named)
    return tensor(shape=list(shape), dtype=dtype, **named)


@torch.no_grad()
def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """Extension function: a tensor to be overwritten, filled with zeros. No collectives."""
    alone = quantizer.copy()
    if hasattr(alone, "with_amax_reduction"):
        alone.with_amax_reduction = False
    return store(buffers(torch.zeros(shape, dtype=dtype), alone), torch.Size(shape), dtype, quantizer)


def buffers(tensor: Tensor, quantizer: Any) -> Buffers:
    """Casts `[..., k]` values; delayed scaling also records the maximum, the other recipes compute their scales."""
    return _RECIPES[_kind(quantizer)](tensor.detach().contiguous(), quantizer)


def _kind(quantizer: Any) -> str:
    name = type(quantizer).__name__
    if name not in _RECIPES:
        raise NotImplementedError(f"{name} has no CPU version; valid recipes: delayed, tensorwise, blockwise, mxfp8")
    return name


def _classes(kind: str) -> tuple[type, type, dict[str, str]]:
    """Storage class, tensor class, and those of their keywords that differ from the attribute's name."""
    from transformer_engine.pytorch import tensor

    if kind == "Float8BlockQuantizer":
        return tensor.Float8BlockwiseQTensorStorage, tensor.Float8BlockwiseQTensor, {}
    if kind == "MXFP8Quantizer":
        return tensor.MXFP8TensorStorage, tensor.MXFP8Tensor, {}
    return (
        tensor.Float8TensorStorage,
        tensor.Float8Tensor,
        {"_scale_inv": "fp8_scale_inv", "_transpose": "data_transpose"},
    )


def _delayed(values: Tensor, quantizer: Any) -> Buffers:
    """Casts with the scale of the last update; `quantizer.amax` is a row of the history."""
    torch.maximum(quantizer.amax, largest_magnitude(values).reshape(1), out=quantizer.amax)
    return _one_scale(values, quantizer, quantizer.scale.reshape(1))


def _current(values: Tensor, quantizer: Any) -> Buffers:
    """Casts with a scale from the tensor's own maximum, reduced over the quantiser's process group if it has one."""
    amax = largest_magnitude(values).reshape(1)
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group())
    largest = FORMATS[quantizer.dtype].largest
    arguments = quantizer.amax_epsilon, quantizer.force_pow_2_scales, FLOAT_MAX
    return _one_scale(values, quantizer, scale_from_amax(amax, largest, *arguments))


def _one_scale(values: Tensor, quantizer: Any, scale: Tensor) -> Buffers:
    """One scale `[1]` for the whole tensor. The emulated device supports any GEMM layout, so no transpose is stored."""
    codes = FORMATS[quantizer.dtype].cast(values, scale)
    return {"_data": codes, "_scale_inv": 1.0 / scale, "_transpose": None}


def _blockwise(values: Tensor, quantizer: Any) -> Buffers:
    """One scale per 128 values along a row or a column (inputs, gradients), or per 128 x 128 tile (weights)."""
    matrix = values.view(-1, values.shape[-1])
    tall, wide = (BLOCK, BLOCK) if quantizer.block_scaling_dim == 2 else (1, BLOCK)
    parts: Buffers = dict.fromkeys(("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv"))
    if quantizer.rowwise_usage:
        codes, inverse = _tiles(matrix, tall, wide, quantizer)
        parts["_rowwise_data"] = codes.view(values.shape)
        parts["_rowwise_scale_inv"] = _pad(inverse.t() if tall == 1 else inverse, columns=4)
    if quantizer.columnwise_usage:
        codes, inverse = _tiles(matrix, wide, tall, quantizer)
        parts["_columnwise_data"] = codes.t().reshape(values.shape[-1], *values.shape[:-1])
        parts["_columnwise_scale_inv"] = _pad(inverse if tall == 1 else inverse.t(), columns=4)
    return parts


def _tiles(matrix: Tensor, tall: int, wide: int, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Codes `[m, k]` and inverse scales `[ceil(m / tall), ceil(k / wide)]` of tiles; those at the edge are smaller."""
    rows, columns = matrix.shape
    padded = _pad(matrix, rows=tall, columns=wide)
    tiles = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide)
    target: Format = FORMATS[quantizer.dtype]
    arguments = quantizer.amax_epsilon, quantizer.force_pow_2_scales, torch.finfo(matrix.dtype).max
    scale = scale_from_amax(largest_magnitude(tiles, (1, 3)), target.largest, *arguments)
    codes = target.cast(tiles, scale[:, None, :, None]).view(padded.shape)
    return codes[:rows, :columns].contiguous(), 1.0 / scale


def _mxfp8(values: Tensor, quantizer: Any) -> Buffers:
    """One power-of-two scale per 32 values along a row; a second copy has one per 32 values along a column."""
    matrix = values.view(-1, values.shape[-1])
    rows, columns = matrix.shape
    if rows % MX_BLOCK or columns % MX_BLOCK:
        raise RuntimeError(f"MXFP8 needs dimensions that are multiples of {MX_BLOCK}, got {tuple(values.shape)}")
    target = FORMATS[quantizer.dtype]
    parts: Buffers = {}
    for name, wanted, tiles, dim, padding in (
        ("_rowwise", quantizer.rowwise_usage, matrix.view(rows, -1, MX_BLOCK), 2, (128, 4)),
        ("_columnwise", quantizer.columnwise_usage, matrix.view(-1, MX_BLOCK, columns), 1, (4, 128)),
    ):
        exponent = shared_exponent(largest_magnitude(tiles, (dim,)), target.largest) if wanted else None
        parts[f"{name}_data"] = parts[f"{name}_scale_inv"] = None
        if exponent is not None:
            codes = target.cast(tiles, reciprocal_of_exponent(exponent).unsqueeze(dim))
            parts[f"{name}_data"] = codes.view(values.shape)
            parts[f"{name}_scale_inv"] = _pad(exponent, *padding)
    return parts


_RECIPES = {
    "Float8Quantizer": _delayed,
    "Float8CurrentScalingQuantizer": _current,
    "Float8BlockQuantizer": _blockwise,
    "MXFP8Quantizer": _mxfp8,
}


def _pad(matrix: Tensor, rows: int = 1, columns: int = 1) -> Tensor:
    """Pads with zeros at the bottom and right, up to multiples of `rows` and `columns`."""
    missing = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    return F.pad(matrix, missing) if any(missing) else matrix.contiguous()


@dataclass(frozen=True)
class Operand:
    """A factor of a matrix product."""

    values: Tensor
    """`[m, k]`: unchanged if high precision; else decoded codes in fp32 with block scales applied (exact for powers of
    two)."""
    scale: Tensor | None
    """Inverse scale of a per-tensor recipe, not yet applied; fp32 `[1]`."""
    format: str


def operand(tensor: Any, rowwise: bool) -> Operand:
    """Prepares a tensor as an operand of a product.

    Args:
        tensor: plain, or quantised with any of the recipes.
        rowwise: selects the copy for a product along rows, otherwise along columns.
    """
    if hasattr(tensor, "_scale_inv"):
        target = FORMATS[tensor._fp8_dtype]
        return Operand(_flat(target.decode(tensor._data)), tensor._scale_inv, target.name)
    if hasattr(tensor, "_is_2D_scaled"):
        return _block_operand(tensor, rowwise)
    if hasattr(tensor, "_rowwise_data"):
        return _mx_operand(tensor, rowwise)
    return Operand(_flat(tensor), None, NAMES[tensor.dtype])


def _block_operand(tensor: Any, rowwise: bool) -> Operand:
    """Decodes the layouts of `_blockwise`; columnwise data are stored transposed."""
    target = FORMATS[tensor._fp8_dtype]
    data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    inverse = tensor._rowwise_scale_inv if rowwise else tensor._columnwise_scale_inv
    assert data is not None, f"a {'row' if rowwise else 'column'}wise copy is needed"
    # A transposed matrix has tiles along its rows, like a rowwise one.
    matrix = _flat(target.decode(data)) if rowwise else target.decode(data).flatten(1)
    rows, columns = matrix.shape
    if tensor._is_2D_scaled:
        inverse = inverse.repeat_interleave(BLOCK, 0)[:rows]
    else:
        inverse = inverse[:, :rows].t()
    matrix = matrix * inverse.repeat_interleave(BLOCK, 1)[:, :columns]
    return Operand(matrix if rowwise else matrix.t(), None, target.name)


def _mx_operand(tensor: Any, rowwise: bool) -> Operand:
    target = FORMATS[tensor._fp8_dtype]
    data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    exponent = tensor._rowwise_scale_inv if rowwise else tensor._columnwise_scale_inv
    assert data is not None, f"a {'row' if rowwise else 'column'}wise copy is needed"
    matrix = _flat(target.decode(data))
    rows, columns = matrix.shape
    if rowwise:
        scale = value_of_exponent(exponent[:rows, : columns // MX_BLOCK]).repeat_interleave(MX_BLOCK, 1)
    else:
        scale = value_of_exponent(exponent[: rows // MX_BLOCK, :columns]).repeat_interleave(MX_BLOCK, 0)
    return Operand(matrix * scale, None, target.name)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


@torch.no_grad()
def dequantize(input: Any, otype: DType) -> Tensor:
    """Extension function: the values `[..., k]` of a quantised tensor's rowwise copy, in high precision."""
    found = operand(input, rowwise=True)
    values = found.values if found.scale is None else found.values * found.scale
    return values.view(input.size()).to(TORCH_DTYPES[otype])


@torch.no_grad()
def bgrad_quantize(input: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Extension function: column sums `[k]` of `[..., k]` before the cast, rounded once, and the cast."""
    sums = _flat(input).sum(0, dtype=torch.float32).to(input.dtype)
    return sums, input.contiguous() if quantizer is None else quantize(input, quantizer)


def compute_amax(input: Tensor, amax: Tensor) -> None:
    """Extension function: writes the largest magnitude to `amax`, one number."""
    amax.copy_(largest_magnitude(input.detach()).reshape(amax.shape))


def fp8_transpose(input: Tensor, dtype: DType, *, out: Tensor | None = None) -> Tensor:
    """Extension function: codes `[..., k]` to `[k, ...]`."""
    transposed = _flat(input).t().reshape(input.shape[-1], *input.shape[:-1]).contiguous()
    return transposed if out is None else out.copy_(transposed)


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Extension function: `[a, b, ...]` to `[b, a, ...]`."""
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


@torch.no_grad()
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: list[Tensor],
    scales: list[Tensor],
    amax_compute_algo: str,
    fp8_dtype: DType,
    margin: float,
) -> None:
    """Extension function: updates delayed scaling between two steps, in place.

    Args:
        amax_reduction_buffer: this step's maxima of all modules, concatenated, reduced over all ranks.
        amax_histories: `[length, n]` per module; row 0 accumulates, the last row is the newest.
        scales: `[n]` per module; unchanged where the maximum is 0 or not finite.
        amax_compute_algo: most_recent or max.
        margin: number of powers of two by which the scale stays below the format's range.
    """
    assert amax_compute_algo in ("max", "most_recent"), amax_compute_algo
    aim = FORMATS[DType(fp8_dtype)].largest * math.pow(2.0, -margin)
    recent = amax_reduction_buffer.split([scale.numel() for scale in scales])
    for reduced, history, scale in zip(recent, amax_histories, scales, strict=True):
        newest = torch.where(reduced != 0, reduced, history[0])
        rolled = torch.cat([history[1:], newest[None]])
        amax = newest if amax_compute_algo == "most_recent" else rolled.amax(0)
        rolled[0] = 0
        # A module that has not run since the last update keeps history and scale.
        ran = newest != 0
        history.copy_(torch.where(ran, rolled, history))
        quotient = (torch.full_like(amax, aim) / amax).clamp(max=FLOAT_MAX)
        scale.copy_(torch.where(ran & amax.isfinite() & (amax > 0), quotient, scale))
