"""Hidden-state matching on one rank: the gradient that is put on the path, against autograd on a dense formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_capgap.config import schema
from megatron_capgap.losses.hidden_matching import MATCHINGS, match
from tests.support.memory import allocations


def reference(student: Tensor, teacher: Tensor, mask: Tensor, kind: str, projection: Tensor | None) -> Tensor:
    """The sum over tokens, one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs, counts in zip(student, teacher, mask, strict=True):
        if projection is not None:
            mine = projection @ mine
        if kind == "mse":
            total = total + counts * sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True)) / len(theirs)
        else:
            total = total + counts * (1 - mine @ theirs / (mine.norm() * theirs.norm()))
    return total


def tensors(tokens: int, projected: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    """student [n, 5] and projection [7, 5], which want gradients, and teacher [n, 7] or [n, 5]."""
    make = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

    projection = random(7, 5).requires_grad_() if projected else None
    return random(tokens, 5).requires_grad_(), random(tokens, 7 if projected else 5), projection


def test_every_kind_of_the_configuration_has_a_formula() -> None:
    assert tuple(MATCHINGS) == schema.MATCHINGS


@given(
    kind=st.sampled_from(list(MATCHINGS)),
    projected=st.booleans(),
    mask=st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=1, max_size=9),
    weight=st.sampled_from([0.3, 1.0, 4.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_value_and_gradients(kind: str, projected: bool, mask: list[float], weight: float, dtype: torch.dtype) -> None:
    """The gradient joins whatever else arrives at the hidden states."""
    limit = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    student, teacher, projection = tensors(len(mask), projected, dtype)
    out, loss = match(student, teacher, torch.tensor(mask), kind, weight, projection)
    assert torch.equal(out, student) and not loss.requires_grad
    (out * 3).sum().backward()

    leaves = [x.detach().double().requires_grad_() for x in (student, projection) if x is not None]
    exact = reference(leaves[0], teacher.double(), torch.tensor(mask).double(), kind, leaves[1] if projected else None)
    (weight * exact + 3 * leaves[0].sum()).backward()
    assert abs(loss - weight * exact) <= limit * weight * exact.abs() + 1e-12
    for mine, theirs in zip((student, projection), leaves, strict=False):
        assert (mine.grad.double() - theirs.grad).norm() <= limit * theirs.grad.norm() + 1e-12


@pytest.mark.parametrize("kind", MATCHINGS)
def test_equal_states_cost_nothing(kind: str) -> None:
    student, *_ = tensors(6, False)
    out, loss = match(student, student.detach().clone(), torch.ones(6), kind, 1.0)
    (0 * out).sum().backward()
    assert abs(loss) < 1e-12 and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", MATCHINGS)
def test_states_of_zero_stay_finite(kind: str) -> None:
    student = torch.zeros(3, 5, requires_grad=True)
    out, loss = match(student, torch.zeros(3, 5), torch.ones(3), kind, 1.0)
    out.sum().backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_nothing_is_held_until_the_backward_pass() -> None:
    student, teacher = torch.randn(500, 64, requires_grad=True), torch.randn(500, 96)
    projection, mask = torch.randn(96, 64, requires_grad=True), torch.ones(500)
    _, held, peak = allocations(lambda: match(student, teacher, mask, "mse", 1.0, projection))
    assert held < 1000 < peak
