"""Matching losses: distance of a student layer's hidden states from a teacher layer's, and its gradient.

Shapes: n tokens (with sequence parallelism this rank's shard of them), hidden sizes h_student and h_teacher.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """[n, h], [n, h] -> [n]: squared difference, averaged over the hidden size."""
    return (student - teacher).square().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """[n, h], [n, h] -> [n]: 1 - cosine similarity."""
    return 1 - torch.cosine_similarity(student, teacher, dim=-1)


MATCHINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mean_squared_error, "cosine": cosine_distance}


def matching_sum(student: Tensor, teacher: Tensor, mask: Tensor, kind: str, projection: Tensor | None) -> Tensor:
    """The distance between student and teacher, summed over tokens with weights `mask`: a scalar, fp32 or wider.

    Args:
        student: [n, h_student].
        teacher: [n, h_teacher].
        mask: [n] weight of each token.
        kind: a name from `MATCHINGS`.
        projection: [h_teacher, h_student], applied to the student; None if the hidden sizes are equal.
    """
    if projection is not None:
        student = student @ projection.t()
    exact = torch.promote_types(student.dtype, torch.float32)
    return MATCHINGS[kind](student.to(exact), teacher.to(exact)) @ mask.to(exact)


def match(
    student: Tensor, teacher: Tensor, mask: Tensor, kind: str, weight: float, projection: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Identity autograd function whose backward adds the matching-loss gradient.

    The loss therefore needs no part of the pipeline schedule that runs the backward pass. No collectives: with sequence
    parallelism the sum and the projection's gradient are partial over the tensor-parallel ranks. Only the arguments
    are kept for the backward pass, which recomputes the distance.

    Args:
        student: [n, h_student].
        teacher: [n, h_teacher].
        mask: [n] weight of each token.
        kind: a name from `MATCHINGS`.
        weight: of the loss.
        projection: [h_teacher, h_student], applied to the student; None if the hidden sizes are equal.

    Returns:
        A view of the student's hidden states, whose backward adds the gradient of weight * sum to the incoming one;
        and weight * sum, detached.
    """
    return _Match.apply(student, projection, teacher, mask, kind, weight)


class _Match(torch.autograd.Function):
    """The autograd function of `match`."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, projection: Tensor | None, teacher: Tensor, mask: Tensor, kind: str, weight: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(student, projection, teacher, mask)
        ctx.kind, ctx.weight = kind, weight
        loss = weight * matching_sum(student, teacher, mask, kind, projection)
        ctx.mark_non_differentiable(loss)
        return student.view_as(student), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student, projection, teacher, mask = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in (student, projection) if x is not None]
        with torch.enable_grad():
            loss = ctx.weight * matching_sum(
                leaves[0], teacher, mask, ctx.kind, None if projection is None else leaves[1]
            )
            of_student, *of_projection = torch.autograd.grad(loss, leaves)
        of_weight = of_projection[0] if of_projection else None
        return gradient + of_student, of_weight, None, None, None, None
