"""The sum of squares behind the gradient norm: as exact as fp32 asks for, and the same wherever parameters lie."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_capgap.training.optimizer import sum_of_squares


def exact(tensors: list[torch.Tensor]) -> float:
    return sum(piece.double().square().sum().item() for tensor in tensors for piece in tensor.view(-1).split(1 << 20))


def test_a_large_parameter_loses_no_digits() -> None:
    (gradient,) = drawn = [torch.randn(5_000, 1_000, generator=torch.Generator().manual_seed(1))]
    assert abs(sum_of_squares(drawn).item() / exact(drawn) - 1) < 1e-7
    assert sum_of_squares([gradient[:0], gradient[0, :7]]).item() > 0, "a shard may be empty, or less than a piece"


@given(st.integers(0, 2**32), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_the_norm_does_not_depend_on_the_stages_that_hold_the_parameters(seed: int, stages: list[int]) -> None:
    random = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(97 * size, 61, generator=random) * 10.0**-size for size in range(1, len(stages) + 1)]
    dealt = [[gradient for gradient, at in zip(gradients, stages, strict=True) if at == stage] for stage in range(4)]
    norms = [sum(sum_of_squares(held) for held in parts if held).sqrt().float() for parts in (dealt, [gradients])]
    assert norms[0] == norms[1]
    assert abs(norms[0].item() / exact(gradients) ** 0.5 - 1) < 2e-7
