"""The emulated module `transformer_engine_torch`: all of its names, of which those needed here are implemented."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from typing import Any

from megatron_capgap.devices.transformer_engine_cpu import gemm, master, norms, quantize
from megatron_capgap.devices.transformer_engine_cpu.formats import DType

NAME = "transformer_engine_torch"


class FP8FwdTensors(enum.IntEnum):
    """Indices of a module's forward quantisers in Transformer Engine's lists."""

    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    """Indices of a module's backward quantisers in Transformer Engine's lists."""

    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    """Attention kernels; Transformer Engine asserts that there is no other member."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class _Named(type):
    """Metaclass whose attributes are distinct integers, for enumerations of kernels that are not emulated."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(vars(cls)))
        return getattr(cls, name)


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    gemm.generic_gemm,
    quantize.quantize,
    quantize.create_empty_quantized_tensor,
    quantize.dequantize,
    quantize.bgrad_quantize,
    quantize.compute_amax,
    quantize.fp8_transpose,
    quantize.swap_first_dims,
    quantize.fused_amax_and_scale_update_after_reduction,
    master.multi_tensor_scale,
    master.multi_tensor_compute_scale_and_scale_inv,
    master.fp8_block_scaling_compute_partial_amax,
    master.fp8_block_scaling_partial_cast,
    norms.rmsnorm_fwd,
    norms.rmsnorm_bwd,
    norms.layernorm_fwd,
    norms.layernorm_bwd,
)
_TYPES = (DType, FP8FwdTensors, FP8BwdTensors, NVTE_Fused_Attn_Backend)
_FOREIGN_TYPES = (
    "CommOverlap",
    "CommOverlapHelper",
    "CommOverlapP2P",
    "CommOverlapType",
    "FP8TensorMeta",
    "NVTEQBHistogramMode",
    "NVTERoutingMapFormat",
    "NVTEScalingMode",
    "NVTE_Bias_Type",
    "NVTE_Mask_Type",
    "NVTE_QKV_Format",
    "NVTE_QKV_Layout",
    "NVTE_Softmax_Type",
)


def module() -> types.ModuleType:
    """A new emulated module. Functions that are not implemented exist by name, and raise when called."""
    made = types.ModuleType(NAME, "A CPU version of what Megatron-Core's dense GPT layers call.")
    for member in (*_FUNCTIONS, *_TYPES):
        setattr(made, member.__name__, member)
    for name in _FOREIGN_TYPES:
        setattr(made, name, _Named(name, (), {}))
    # `from transformer_engine_torch import *` copies names bound now, so they must not change later.
    names = [name for name in vars(made) if not name.startswith("__")]
    vars(made).update(__all__=names, __getattr__=_absent)
    return made


def _absent(name: str) -> Callable[..., Any]:
    """A replacement that raises for a function without a CPU version."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"Transformer Engine's kernel {name} has no CPU version")

    return refuse
