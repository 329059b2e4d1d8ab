"""The loss on a GPU against the dense float64 reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_capgap.config.schema import DIVERGENCES
from megatron_capgap.losses import Loss, TeacherHidden, TeacherLogits, TeacherTopK, distillation_loss
from megatron_capgap.losses.backend import Kernels
from tests.support.loss_cases import Case, Tensors
from tests.support.reference_loss import reference_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible"),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def moved(teacher: Any) -> Any:
    """The teacher's tensors on the GPU."""
    match teacher:
        case TeacherHidden(hidden, head):
            return TeacherHidden(hidden.cuda(), head.cuda())
        case TeacherLogits(logits):
            return TeacherLogits(logits.cuda())
        case TeacherTopK():
            return replace(teacher, ids=teacher.ids.cuda(), log_probs=teacher.log_probs.cuda())


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("teacher", ["hidden", "logits", "ghost"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients(
    divergence: str, temperature: float, teacher: str, dtype: torch.dtype, kernels: Kernels
) -> None:
    case = Case(divergence=divergence, teacher=teacher, dtype=dtype, temperature=temperature, kernels=kernels)
    whole = Tensors(case)
    objective = case.objective()
    expected = reference_loss(whole.hidden, whole.head, whole.teacher, whole.labels, whole.mask, objective, case.vocab)
    hidden, head = (tensor.cuda().requires_grad_() for tensor in (whole.hidden, whole.head))
    out = distil(case, whole, hidden, head, moved(whole.teacher))
    out.loss_sum.backward()
    found = (out.loss_sum, hidden.grad, head.grad)
    for mine, right in zip(found, (expected.loss, expected.hidden_gradient, expected.head_gradient), strict=True):
        assert error(mine, right) <= TOLERANCE[dtype]


def distil(case: Case, whole: Tensors, hidden: Tensor, head: Tensor, teacher: Any, **options: Any) -> Loss:
    return distillation_loss(
        hidden,
        head,
        teacher,
        whole.labels.cuda(),
        whole.mask.cuda(),
        objective=case.objective(),
        vocab_size=case.vocab,
        group=None,
        chunk_tokens=case.chunk_tokens,
        kernels=case.kernels,
        **options,
    )


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.detach().cpu().double() - expected).norm() / expected.norm()).item()


# Rows of several blocks, the last of them cut; the vocabulary is no multiple of 16.
LARGE = Case(kernels="triton", tokens=64, chunk_tokens=48, vocab=20011, padded=20096)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_give_exactly_zero(dtype: torch.dtype, divergence: str) -> None:
    case = replace(LARGE, divergence=divergence, dtype=dtype, temperature=2.5, weights=(1.0, 0.0))
    whole = Tensors(case)
    hidden, head = (tensor.cuda().requires_grad_() for tensor in (whole.hidden, whole.head))
    out = distil(case, whole, hidden, head, TeacherHidden(hidden.detach(), head.detach()))
    out.loss_sum.backward()
    assert not hidden.grad.any() and not head.grad.any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_large_bf16_head_gradient_is_not_rounded(divergence: str) -> None:
    """The kernels give the eager losses, and main_grad gets its sum in fp32 within the matrix products."""
    found = {}
    for kernels in ("eager", "triton"):
        case = replace(LARGE, divergence=divergence, dtype=torch.bfloat16, kernels=kernels)
        whole = Tensors(case)
        hidden, head = (tensor.cuda().requires_grad_() for tensor in (whole.hidden, whole.head))
        head.main_grad = torch.ones_like(head, dtype=torch.float32)
        out = distil(case, whole, hidden, head, moved(whole.teacher), into_main_grad=True)
        out.loss_sum.backward()
        found[kernels] = out.loss_sum.detach(), hidden.grad, head.main_grad - 1
        assert head.grad is None and head.main_grad.dtype == torch.float32
    for mine, eager, limit in zip(found["triton"], found["eager"], (1e-4, 1e-2, 1e-2), strict=True):
        assert error(mine, eager.cpu().double()) <= limit
