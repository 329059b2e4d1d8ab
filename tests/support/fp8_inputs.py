"""What quantisers are tried on, and the buffers that they are to fill, on a CPU as on a GPU."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support import fp8_reference as reference

TARGETS = {"e4m3": reference.E4M3, "e5m2": reference.E5M2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INFINITY, NAN = float("inf"), float("nan")


def double(tensor: Tensor) -> reference.Array:
    """On the host, in float64."""
    return tensor.cpu().double().numpy()


def inputs(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices of every kind."""
    generator = torch.Generator().manual_seed(rows * columns)
    normal = torch.randn(rows, columns, generator=generator)
    # From the smallest subnormals to numbers whose scale overflows nothing.
    wide = normal * torch.exp2(torch.randint(-140, 120, (rows, columns), generator=generator).double()).float()
    spoilt = normal.clone()
    spoilt[0, :7] = torch.tensor([INFINITY, -INFINITY, NAN, -NAN, 0.0, -0.0, 3.0e38])
    spoilt[rows // 2] = NAN
    lone = torch.zeros(rows, columns)
    lone[-1, -1] = 1.0e-39
    kinds = {"normal": normal, "wide": wide, "spoilt": spoilt, "zero": torch.zeros(rows, columns)}
    kinds |= {"huge": normal.clamp(-1, 1) * 3.0e38, "tiny": normal * 1.0e-39, "lone": lone}
    kinds |= {"infinite": torch.full((rows, columns), INFINITY), "nan": torch.full((rows, columns), NAN)}
    return {name: values.to(dtype) for name, values in kinds.items()}


def quantiser(recipe: str, name: str, amax: Tensor, *, weight: bool = False) -> Any:
    """Transformer Engine's own, which must be importable; delayed scaling has scale 3 and records into `amax` `[1]`."""
    import transformer_engine.pytorch as te
    from transformer_engine_torch import DType

    dtype = {"e4m3": DType.kFloat8E4M3, "e5m2": DType.kFloat8E5M2}[name]
    return {
        "delayed": lambda: te.Float8Quantizer(torch.tensor(3.0, device=amax.device), amax, dtype),
        "tensorwise": lambda: te.Float8CurrentScalingQuantizer(dtype, device=amax.device),
        "blockwise": lambda: te.Float8BlockQuantizer(
            dtype, rowwise=True, columnwise=True, block_scaling_dim=2 if weight else 1
        ),
        "mxfp8": lambda: te.MXFP8Quantizer(dtype),
    }[recipe]()


def expected_buffers(recipe: str, name: str, values: Tensor, weight: bool) -> dict[str, np.ndarray]:
    """The same from the reference, in the layouts that a GEMM reads."""
    target, matrix = TARGETS[name], double(values).reshape(-1, values.shape[-1])
    turned = np.ascontiguousarray(matrix.T)
    if recipe in ("delayed", "tensorwise"):
        scale = 3.0 if recipe == "delayed" else reference.current_scale(reference.amax(matrix), target)
        made = reference.per_tensor(matrix, target, scale)
        return {"_data": made.codes, "_scale_inv": made.inverse[0]}
    if recipe == "blockwise":
        overflow = reference.BF16_MAX if values.dtype == torch.bfloat16 else reference.FLOAT_MAX
        tall = 128 if weight else 1
        rows = reference.block(matrix, target, tall, 128, overflow)
        columns = reference.block(turned, target, tall, 128, overflow)
        turn = (lambda scales: scales) if weight else np.transpose
        return {
            "_rowwise_data": rows.codes,
            "_rowwise_scale_inv": turn(rows.inverse),
            "_columnwise_data": columns.codes,
            "_columnwise_scale_inv": turn(columns.inverse),
        }
    (rows, row_exponents), (columns, column_exponents) = (
        reference.mx(matrix, target, columns=along) for along in (False, True)
    )
    return {
        "_rowwise_data": rows.codes,
        "_rowwise_scale_inv": row_exponents,
        "_columnwise_data": columns.codes,
        "_columnwise_scale_inv": column_exponents,
    }
