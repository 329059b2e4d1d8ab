"""FP8 recipes written out to be read: numpy, float64 and integers, nothing of the code under test.

Matrices are `[m, k]`; float32 and bfloat16 values are held exactly in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FLOAT_MAX = float(np.finfo(np.float32).max)
BF16_MAX = math.ldexp(2.0 - 2.0**-7, 127)


@dataclass(frozen=True)
class Format:
    """An FP8 format, as the list of its finite values."""

    values: tuple[float, ...]
    """Of the codes 0, 1, 2 ... without a sign bit, up to the largest finite one."""
    codes: tuple[float, ...]
    """Of all 256 codes, infinities and NaN included."""

    @property
    def largest(self) -> float:
        return self.values[-1]


def _format(exponent_bits: int, mantissa_bits: int, finite_codes: int, has_infinity: bool) -> Format:
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(finite_codes):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits
        significand = fraction if exponent == 0 else 1.0 + fraction
        values.append(math.ldexp(significand, max(exponent, 1) - bias))
    rest = [math.inf] * has_infinity + [math.nan] * 128
    positive = (values + rest)[:128]
    return Format(tuple(values), tuple(positive + [-value for value in positive]))


E4M3 = _format(4, 3, 0x7F, has_infinity=False)
E5M2 = _format(5, 2, 0x7C, has_infinity=True)
assert (E4M3.largest, E5M2.largest) == (448.0, 57344.0)


def float32(values: Array) -> Array:
    """Rounded to float32."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float32).astype(np.float64)


def bfloat16(values: Array) -> Array:
    """Finite numbers, rounded to bfloat16 by way of float32 integers."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def cast(values: Array, scale: Array | float, target: Format) -> NDArray[np.uint8]:
    """Codes of float32(values * scale): the nearest value of the list, the even code of two as near."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = float32(values * scale)
    table = np.array(target.values)
    magnitude = np.minimum(np.nan_to_num(np.abs(scaled), nan=0.0, posinf=target.largest), target.largest)
    above = np.searchsorted(table, magnitude)  # the first code that is not smaller
    below = np.maximum(above - 1, 0)
    down, up = magnitude - table[below], table[above] - magnitude
    code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    code = code + 128 * np.signbit(scaled)
    return np.where(np.isnan(scaled), 0x7F, code).astype(np.uint8)


def decode(codes: NDArray[np.uint8], target: Format) -> Array:
    """The values of codes."""
    return np.array(target.codes)[codes]


def amax(values: Array) -> float:
    """The largest magnitude that is a number; 0 where there is none."""
    numbers = [abs(float(value)) for value in values.ravel() if not math.isnan(value)]
    return max(numbers, default=0.0)


def scale_of(maximum: float, target: Format, *, power_of_two: bool, overflow: float) -> float:
    """fp8 maximum / tensor maximum in float32; 1 where that is 0 or infinite."""
    if maximum == 0.0 or math.isinf(maximum):
        return 1.0
    scale = float(float32(np.array(target.largest / maximum)))
    scale = overflow if math.isinf(scale) else scale
    return math.ldexp(0.5, math.frexp(scale)[1]) if power_of_two else scale


def exponent_of(maximum: float, target: Format) -> int:
    """E8M0 of float32(maximum / fp8 maximum), rounded up to a power of two; 127 stands for 1."""
    reciprocal = float(np.float32(1.0 / target.largest))
    quotient = float(float32(np.array(maximum * reciprocal)))
    if quotient == 0.0:
        return 0
    if math.isinf(quotient):
        return 254
    fraction, power = math.frexp(quotient)  # fraction in [0.5, 1)
    return min(max(127 + (power if fraction > 0.5 else power - 1), 0), 254)


def inverse(scale: float) -> float:
    """float32(1 / scale)."""
    return float(float32(np.array(1.0 / scale)))


@dataclass(frozen=True)
class Quantised:
    """A cast matrix."""

    codes: NDArray[np.uint8]
    """`[m, k]`."""
    inverse: Array
    """What multiplies each decoded value, or each tile: one number a tile."""
    values: Array
    """`[m, k]`, decoded and multiplied, in float64."""


def tiled(
    matrix: Array, tall: int, wide: int, target: Format, scales: Callable[[float], tuple[float, float]]
) -> Quantised:
    """Casts tile by tile.

    Args:
        scales: from a tile's maximum, the factor before the cast and the one after it.
    """
    rows, columns = matrix.shape
    codes, values = np.zeros(matrix.shape, np.uint8), np.zeros(matrix.shape)
    factors = np.zeros((math.ceil(rows / tall), math.ceil(columns / wide)))
    for i, top in enumerate(range(0, rows, tall)):
        for j, left in enumerate(range(0, columns, wide)):
            here = slice(top, top + tall), slice(left, left + wide)
            before, after = scales(amax(matrix[here]))
            codes[here] = cast(matrix[here], before, target)
            values[here] = decode(codes[here], target) * after
            factors[i, j] = after
    return Quantised(codes, factors, values)


def per_tensor(matrix: Array, target: Format, scale: float) -> Quantised:
    """One scale for all."""
    codes = cast(matrix, scale, target)
    return Quantised(codes, np.array([[inverse(scale)]]), decode(codes, target) * inverse(scale))


def current_scale(maximum: float, target: Format) -> float:
    """The tensorwise recipe's scale."""
    return scale_of(maximum, target, power_of_two=False, overflow=FLOAT_MAX)


def block(matrix: Array, target: Format, tall: int, wide: int, overflow: float) -> Quantised:
    """The blockwise recipe: powers of two."""

    def scales(maximum: float) -> tuple[float, float]:
        scale = scale_of(maximum, target, power_of_two=True, overflow=overflow)
        return scale, inverse(scale)

    return tiled(matrix, tall, wide, target, scales)


def mx(matrix: Array, target: Format, *, columns: bool) -> tuple[Quantised, NDArray[np.uint8]]:
    """The MXFP8 recipe along rows, or along columns; also the shared exponents, one a tile."""
    tall, wide = (32, 1) if columns else (1, 32)
    exponents: list[int] = []

    def scales(maximum: float) -> tuple[float, float]:
        exponent = exponent_of(maximum, target)
        exponents.append(exponent)
        # From Transformer Engine 2.13 on; before, the first factor was 1 for exponent 0, and 0 for 254.
        return math.ldexp(1.0, 127 - exponent), math.ldexp(1.0, exponent - 127)

    found = tiled(matrix, tall, wide, target, scales)
    return found, np.array(exponents, np.uint8).reshape(found.inverse.shape)


class Delayed:
    """Scale and maxima of one tensor under delayed scaling."""

    def __init__(self, target: Format, length: int, algorithm: str, margin: int = 0) -> None:
        self.target, self.algorithm, self.margin = target, algorithm, margin
        self.scale, self.history = 1.0, [0.0] * length

    def record(self, maximum: float) -> None:
        """A cast in this step."""
        self.history[0] = max(self.history[0], maximum)

    def update(self) -> None:
        """The end of a step: the newest maximum goes to the end of the history, and decides or helps to decide."""
        newest = self.history[0]
        if newest == 0.0:
            return
        considered = [*self.history[1:], newest]
        self.history = [0.0, *considered[1:]]
        maximum = newest if self.algorithm == "most_recent" else max(considered)
        if not math.isinf(maximum):
            scale = float(float32(np.array(self.target.largest * 2.0**-self.margin / maximum)))
            self.scale = min(scale, FLOAT_MAX)
