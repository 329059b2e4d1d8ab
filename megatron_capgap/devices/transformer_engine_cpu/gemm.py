"""Matrix products of quantised and plain operands, with counts of the formats used."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_capgap.devices.transformer_engine_cpu.formats import TORCH_DTYPES, DType
from megatron_capgap.devices.transformer_engine_cpu.quantize import operand

_PASSES = {(True, False): "fprop", (False, False): "dgrad", (False, True): "wgrad"}


class Gemm(NamedTuple):
    """Kind of a product: its role in a linear layer, and the operands' formats."""

    part: str
    """fprop (input, weight), dgrad (output's gradient, weight) or wgrad (output's gradient, input)."""
    left: str
    """Format of the first operand listed above: e4m3, e5m2, bf16, fp16 or fp32."""
    right: str


_counts: Counter[Gemm] = Counter()


def counts() -> Counter[Gemm]:
    """Number of products of each kind in this process since `reset_counts`."""
    return Counter(_counts)


def reset_counts() -> None:
    """Resets all counts to 0."""
    _counts.clear()


@torch.no_grad()
def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: DType | None,
    bias: Tensor | None,
    bias_type: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
    """Extension function: `D = alpha * op(B) @ op(A) + beta * D`; in a linear, A is the weight or the input.

    Codes are multiplied and summed in fp32; per-tensor scales multiply the sum, block scales the codes. The bias is
    added in fp32, and the result is rounded once to the output dtype. GPUs sum in another order, some in fewer bits.

    Returns:
        D; the bias's gradient (column sums of B) if `grad` is set and a bias is given; None; `extra_output`.

    Raises:
        NotImplementedError: GELU epilogues, quantised outputs and overlapped communication.
    """
    if gelu or quantizer is not None or comm_overlap is not None:
        raise NotImplementedError("GEMMs on the CPU support no GELU, quantised output or overlapped communication")
    right, left = operand(A, rowwise=transA), operand(B, rowwise=not transB)
    _counts[Gemm(_PASSES[transA, transB], left.format, right.format)] += 1
    shape = [left.values.shape[1]] if transB else list(B.size()[:-1])
    dtype = D.dtype if D is not None else TORCH_DTYPES[output_dtype] if output_dtype is not None else A.dtype
    grad_bias = None
    if bias is not None and grad:
        grad_bias = left.values.sum(0, dtype=torch.float32).to(dtype)
        bias = None
    first = left.values.t() if transB else left.values
    second = right.values.t() if transA else right.values
    plain = left.scale is None and right.scale is None and first.dtype == second.dtype == dtype
    if plain and bias is None and alpha == 1.0 and not accumulate:
        product = first @ second
    else:
        product = _wide_product(first, second, left.scale, right.scale, alpha, bias)
    product = product.view(*shape, product.shape[-1])
    if D is None:
        return product.to(dtype), grad_bias, None, extra_output
    if accumulate:
        D.mul_(1.0 if beta is None else beta).add_(product)
    else:
        D.copy_(product)
    return D, grad_bias, None, extra_output


def _wide_product(
    first: Tensor, second: Tensor, scale: Tensor | None, other: Tensor | None, alpha: float, bias: Tensor | None
) -> Tensor:
    """`alpha * first @ second + bias` in fp32; two per-tensor scales multiply the sum by their product."""
    product = (first.float() @ second.float()).mul_(alpha)
    assert (scale is None) == (other is None), "both operands must be scaled per tensor, or neither"
    if scale is not None and other is not None:
        product.mul_(scale * other)
    return product if bias is None else product.add_(bias.float())
