"""FP8 formats, scales and casts, as Transformer Engine 2.20's kernels compute them.

All functions are exact: they give the same bits as the kernels for any input. Tensors may have any shape.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_MAX = torch.finfo(torch.float32).max
_EXPONENT_BITS = 0x7F800000
_NAN_CODE = 0x7F


class DType(enum.IntEnum):
    """`transformer_engine_torch.DType`, with its values; Transformer Engine asserts that there is no other member."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH_DTYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Format:
    """An 8-bit floating-point format."""

    name: str
    dtype: torch.dtype
    largest: float
    """The largest finite value."""

    def cast(self, values: Tensor, scale: Tensor) -> Tensor:
        """Codes (uint8) of `values * scale`: multiplied in fp32, rounded half to even, saturated; NaN is 0x7F.

        Args:
            values: any floating dtype.
            scale: fp32, broadcast against `values`.
        """
        scaled = values.float() * scale
        # torch converts values beyond E5M2's range to infinity.
        codes = scaled.clamp(-self.largest, self.largest).to(self.dtype).view(torch.uint8)
        return codes.masked_fill_(scaled.isnan(), _NAN_CODE)

    def decode(self, codes: Tensor) -> Tensor:
        """The values (fp32, exact) of uint8 codes."""
        return codes.view(self.dtype).float()


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0)
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0)
FORMATS = {DType.kFloat8E4M3: E4M3, DType.kFloat8E5M2: E5M2}


def largest_magnitude(values: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """max |values| over `dims`, or over all; fp32. As in the kernels, NaN is ignored and the maximum is at least 0."""
    dims = tuple(range(values.ndim)) if dims is None else dims
    if values.numel() == 0:
        return values.new_zeros([size for dim, size in enumerate(values.shape) if dim not in dims], dtype=torch.float32)
    found = values.abs().amax(dims)
    if found.isnan().any():
        infinity = float("inf")
        found = values.abs().nan_to_num(nan=0.0, posinf=infinity).amax(dims)
    return found.float()


def scale_from_amax(amax: Tensor, largest: float, epsilon: float, power_of_two: bool, for_infinity: float) -> Tensor:
    """`largest / amax`, one number for each of `amax` (fp32).

    Args:
        amax: fp32, not negative.
        largest: largest finite value of the format.
        epsilon: floor of `amax`.
        power_of_two: whether the scale is truncated to a power of two.
        for_infinity: the scale if the quotient overflows, before truncation.

    Returns:
        Scales; 1 where `amax` is 0, infinite or NaN.
    """
    amax = torch.where(amax < epsilon, torch.full_like(amax, epsilon), amax)
    # Dividing a Python number by a tensor would multiply with the reciprocal, which rounds twice.
    scale = torch.full_like(amax, largest) / amax
    scale = torch.where(scale.isinf(), torch.full_like(scale, for_infinity), scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(scale), scale)


def shared_exponent(amax: Tensor, largest: float) -> Tensor:
    """The biased exponent (uint8, E8M0) shared by 32 values in MXFP8: that of amax / largest, rounded up.

    The quotient is computed as a product with the fp32 reciprocal. Infinity gives 254, the largest finite exponent.
    """
    # The reciprocal must be rounded to fp32 before the product.
    quotient = amax.float() * torch.tensor(1.0 / largest, dtype=torch.float32)
    bits = quotient.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Exponent 0 already represents 2^-127, which is the subnormal with mantissa 0x400000.
    up = (mantissa > 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    return torch.where(quotient.isinf(), torch.full_like(exponent, 254), exponent + up).to(torch.uint8)


def reciprocal_of_exponent(exponent: Tensor) -> Tensor:
    """The kernels' factor before an MXFP8 cast: 2^(127 - e) in fp32; a subnormal for e = 254, NaN for e = 255.

    `ptx::exp2f_rcp` of transformer_engine/common/util/ptx.cuh since 2.13; earlier releases give 1 for e = 0 and 0 for
    e = 254.
    """
    code = exponent.to(torch.int32)
    power = ((254 - code).clamp(min=0) << 23).view(torch.float32)
    power = torch.where(code == 254, torch.full_like(power, 2.0**-127), power)
    return torch.where(code == 255, torch.full_like(power, float("nan")), power)


def value_of_exponent(exponent: Tensor) -> Tensor:
    """2^(e - 127) in fp32, from uint8."""
    power = (exponent.to(torch.int32) << 23).view(torch.float32)
    return torch.where(exponent == 0, torch.full_like(power, 2.0**-127), power)
