"""Sizes and tensors of the loss benchmark, its contenders, and the error of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_parts.measure import Bench

OBJECTIVES = {"kl+ce": (0.5, 0.5), "kl": (1.0, 0.0), "ce": (0.0, 1.0)}
"""Weights of forward KL divergence and cross-entropy."""


@dataclass(frozen=True)
class Size:
    """One problem; under tensor parallelism `vocab` is one rank's share of the vocabulary."""

    name: str
    tokens: int
    student: int
    teacher: int
    vocab: int
    every: bool = True
    """Whether all contenders are measured; otherwise ours, the matrix products and Liger's chunked loss."""

    @property
    def case(self) -> str:
        """Name in the report."""
        return self.name

    @property
    def flops(self) -> float:
        """Of the four matrix products with a head: two forward, two backward."""
        return 2.0 * self.tokens * self.vocab * (3 * self.student + self.teacher)


SIZES = (
    Size("TP1 128256", 8192, 4096, 8192, 128256),
    Size("Liger 128256", 8192, 2048, 4096, 128256),
    Size("TP8 16032", 8192, 4096, 8192, 16032),
    Size("TP8 18992", 8192, 4096, 8192, 18992, every=False),
    Size("TP1 151936", 8192, 4096, 8192, 151936, every=False),
)
TINY_SIZES = (Size("TP1 tiny", 96, 16, 24, 160), Size("TP8 tiny", 96, 16, 24, 40, every=False))
CHUNKS, TINY_CHUNKS = (512, 2048, 4096), (16, 32, 64)
REFERENCE_CHUNK = 512


@dataclass
class Problem:
    """Tensors of one size in bf16: hidden [n, h], heads [v, h], labels and mask [n]; main_grad [v, h] in fp32."""

    size: Size
    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    main_grad: Tensor
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mask = torch.ones(self.labels.shape[0], device=self.labels.device)

    @classmethod
    def random(cls, bench: Bench, size: Size) -> Problem:
        """Normal hidden states; a teacher that is surer than the student."""
        n, v, h, wide = size.tokens, size.vocab, size.student, size.teacher
        make = torch.Generator(bench.device).manual_seed(4)
        return cls(
            size,
            bench.randn(n, h).requires_grad_(),
            bench.randn(v, h, scale=h**-0.5, seed=1).requires_grad_(),
            bench.randn(n, wide, seed=2),
            bench.randn(v, wide, scale=2 * wide**-0.5, seed=3),
            torch.randint(v, (n,), device=bench.device, generator=make),
            torch.zeros(v, h, dtype=torch.float32, device=bench.device),
        )


@dataclass(frozen=True)
class Contender:
    """An implementation of the loss. Its `loss` returns a scalar whose backward pass fills the gradients."""

    name: str
    loss: Callable[[Problem], Tensor]
    objective: str = "kl+ce"
    ours: bool = False
    """Adds the head's gradient to `main_grad`, as in training."""
    is_mean: bool = False
    """Returns the mean over tokens, not the sum."""
    exact: bool = True
    """Leaves no part of the gradient out on purpose."""
    first_only: bool = False
    """Measured at the first size alone."""
    chunk: int | None = None
    """Tokens whose logits exist at a time, if the contender is ours."""
    kernels: str | None = None
    """eager or triton, if the contender is ours."""

    def run(self, problem: Problem) -> None:
        """Forward and backward; leaves no gradients behind, which would count as allocated before the next call."""
        self.step(problem)
        problem.hidden.grad = problem.head.grad = None

    def step(self, problem: Problem) -> None:
        """Forward and backward."""
        problem.hidden.grad = problem.head.grad = None
        if self.ours:
            problem.head.main_grad = problem.main_grad
        try:
            self.loss(problem).backward()
        finally:
            if self.ours:
                del problem.head.main_grad


class Reference:
    """Gradients of a problem in float64, by their formula, of the tensors as they are, rounded to bf16."""

    def __init__(self, problem: Problem) -> None:
        hidden, head = problem.hidden.detach().double(), problem.head.detach().double()
        teacher_head = problem.teacher_head.double()
        self._of_hidden = [torch.empty_like(hidden) for _ in range(2)]  # divergence, cross-entropy
        self._of_head = [torch.zeros_like(head) for _ in range(2)]
        for first in range(0, hidden.shape[0], REFERENCE_CHUNK):
            rows = slice(first, first + REFERENCE_CHUNK)
            q = (hidden[rows] @ head.t()).softmax(1)
            of_divergence = q - (problem.teacher_hidden[rows].double() @ teacher_head.t()).softmax(1)
            q[torch.arange(q.shape[0], device=q.device), problem.labels[rows]] -= 1
            for index, of_logits in enumerate((of_divergence, q)):
                torch.mm(of_logits, head, out=self._of_hidden[index][rows])
                self._of_head[index].addmm_(of_logits.t(), hidden[rows])

    def error(self, problem: Problem, contender: Contender) -> float:
        """The larger relative error of a contender's two gradients."""
        problem.main_grad.zero_()
        contender.step(problem)
        scale = problem.size.tokens if contender.is_mean else 1
        of_head = problem.main_grad if contender.ours else problem.head.grad
        assert problem.hidden.grad is not None and of_head is not None
        weights = OBJECTIVES[contender.objective]
        errors = []
        for found, parts in ((problem.hidden.grad, self._of_hidden), (of_head, self._of_head)):
            right = weights[0] * parts[0] + weights[1] * parts[1]
            norm = right.norm()
            errors.append((right.sub_(found, alpha=scale).norm() / norm).item())
        problem.hidden.grad = problem.head.grad = None
        return max(errors)
