"""RMSNorm and LayerNorm, forward and backward, as the extension computes them: in fp32, summed in any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_capgap.devices.transformer_engine_cpu.formats import TORCH_DTYPES, DType
from megatron_capgap.devices.transformer_engine_cpu.quantize import buffers, quantize, store


def _finish(normalised: Tensor, shape: torch.Size, quantizer: Any, dtype: torch.dtype, output: Any) -> Any:
    """Rounds, and casts if requested: delayed scaling casts the fp32 values, the other recipes the rounded ones."""
    if quantizer is None:
        rounded = normalised.to(dtype).view(shape)
        return rounded if output is None else output.copy_(rounded)
    if type(quantizer).__name__ == "Float8Quantizer":
        return store(buffers(normalised.view(shape), quantizer), shape, dtype, quantizer, output)
    return quantize(normalised.to(dtype).view(shape), quantizer, output)


def _gain(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


@torch.no_grad()
def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:
    """Extension function: RMSNorm forward.

    Args:
        input: `[..., h]`.
        weight: `[h]`.
        quantizer: for the output, or None.

    Returns:
        The output `[..., h]` in `otype` or quantised; None; 1 / rms of each row, fp32.
    """
    x = input.reshape(-1, weight.numel()).float()
    rsigma = torch.rsqrt(x.square().mean(-1) + eps)
    y = _gain(weight, zero_centered_gamma) * (rsigma[:, None] * x)
    return _finish(y, input.shape, quantizer, TORCH_DTYPES[otype], ln_out), None, rsigma


@torch.no_grad()
def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Extension function: gradients of input (`x`'s shape and dtype) and weight `[h]`, from that of the output."""
    dz32, y = dz.reshape(-1, gamma.numel()).float(), x.reshape(-1, gamma.numel()).float() * rsigma[:, None]
    dy = dz32 * _gain(gamma, zero_centered_gamma)
    dx = rsigma[:, None] * (dy - (dy * y).mean(-1, keepdim=True) * y)
    return dx.view(x.shape).to(x.dtype), (dz32 * y).sum(0).to(gamma.dtype)


@torch.no_grad()
def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, Tensor, Tensor]:
    """Extension function: as `rmsnorm_fwd`; returns the output, and mean and 1 / deviation of each row in fp32."""
    x = input.reshape(-1, weight.numel()).float()
    mu = x.mean(-1)
    centred = x - mu[:, None]
    rsigma = torch.rsqrt(centred.square().mean(-1) + eps)
    y = _gain(weight, zero_centered_gamma) * (rsigma[:, None] * centred)
    if bias is not None:
        y = y + bias.float()
    return _finish(y, input.shape, quantizer, TORCH_DTYPES[otype], ln_out), mu, rsigma


@torch.no_grad()
def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Extension function: gradients of input (`x`'s shape and dtype), weight and bias `[h]`."""
    dz32 = dz.reshape(-1, gamma.numel()).float()
    y = (x.reshape(-1, gamma.numel()).float() - mu[:, None]) * rsigma[:, None]
    dy = dz32 * _gain(gamma, zero_centered_gamma)
    dx = rsigma[:, None] * (dy - (dy * y).mean(-1, keepdim=True) * y - dy.mean(-1, keepdim=True))
    return dx.view(x.shape).to(x.dtype), (dz32 * y).sum(0).to(gamma.dtype), dz32.sum(0).to(gamma.dtype)
