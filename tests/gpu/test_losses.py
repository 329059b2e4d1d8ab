"""The loss on a GPU against the dense float64 reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_capgap.config.schema import DIVERGENCES
from megatron_capgap.losses import TeacherHidden, TeacherLogits, TeacherTopK, distillation_loss
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("teacher", ["hidden", "logits", "ghost"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients(divergence: str, teacher: str, dtype: torch.dtype) -> None:
    case = Case(divergence=divergence, teacher=teacher, dtype=dtype, temperature=2.0)
    whole = Tensors(case)
    objective = case.objective()
    expected = reference_loss(whole.hidden, whole.head, whole.teacher, whole.labels, whole.mask, objective, case.vocab)
    hidden, head = (tensor.cuda().requires_grad_() for tensor in (whole.hidden, whole.head))
    out = distillation_loss(
        hidden,
        head,
        moved(whole.teacher),
        whole.labels.cuda(),
        whole.mask.cuda(),
        objective=objective,
        vocab_size=case.vocab,
        group=None,
        chunk_tokens=case.chunk_tokens,
    )
    out.loss_sum.backward()
    found = (out.loss_sum, hidden.grad, head.grad)
    for mine, right in zip(found, (expected.loss, expected.hidden_gradient, expected.head_gradient), strict=True):
        error = (mine.detach().cpu().double() - right).norm() / right.norm()
        assert error <= TOLERANCE[dtype]
