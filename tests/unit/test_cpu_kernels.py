"""The CPU's fused kernels against Megatron-Core's formulas in torch's operators: value and gradient, in float64."""

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_capgap.devices import cpu_kernels
from tests.support.pool import WorkerPool


def test_swiglu() -> None:
    inputs = torch.randn(3, 2, 2 * 7, dtype=torch.float64, requires_grad=True)
    gate, up = inputs.chunk(2, -1)
    expected = torch.sigmoid(gate) * gate * up
    gradient = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, inputs, gradient)
    torch.testing.assert_close(cpu_kernels.swiglu(inputs.detach()), expected.detach())
    torch.testing.assert_close(cpu_kernels.swiglu_back(gradient, inputs.detach()), expected_gradient)


@pytest.mark.parametrize("rotated", [6, 10])
def test_rotary(rotated: int) -> None:
    """Of heads that are a view into packed queries, keys and values; all their columns or only the first."""
    packed = torch.randn(5, 3, 2, 30, dtype=torch.float64, requires_grad=True)
    heads, angles = packed[..., :10], torch.randn(5, 1, 1, rotated // 2).repeat(1, 1, 1, 2)
    expected = rope_utils._apply_rotary_pos_emb_bshd(heads, angles)
    gradient = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, packed, gradient)
    found = cpu_kernels.apply_rotary(heads, angles)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, packed, gradient)[0], expected_gradient)


def test_megatron_uses_them(pool: WorkerPool) -> None:
    assert pool.run(rooms_of_megatrons_kernels, world=1) == [[cpu_kernels.__name__] * 3]


def rooms_of_megatrons_kernels() -> list[str]:
    """Runs in a worker, on the CPU device."""
    from megatron.core.fusions.fused_bias_swiglu import swiglu, swiglu_back

    return [function.__module__ for function in (swiglu, swiglu_back, rope_utils.fused_apply_rotary_pos_emb)]
