"""Inputs of the losses, whole and as one rank holds them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_capgap.losses import DistillationObjective, TeacherHidden, TeacherLogits, TeacherTopK
from megatron_capgap.losses.backend import Kernels
from tests.support.reference_loss import teacher_log_probs


@dataclass(frozen=True)
class Case:
    """One comparison; the defaults are odd on purpose."""

    divergence: str = "forward_kl"
    temperature: float = 1.0
    teacher: str = "hidden"
    dtype: torch.dtype = torch.float64
    tokens: int = 28
    chunk_tokens: int = 9
    vocab: int = 53
    padded: int = 64
    sequence_parallel: bool = False
    masked: str = "some"
    weights: tuple[float, float] = (0.7, 0.4)
    kernels: Kernels = "auto"
    large: float = 0.0
    """Added to a part of the logits and taken from the others: the student's signs are any, the teacher prefers the
    first columns, so that whole shards have no mass."""

    def objective(self) -> DistillationObjective:
        return DistillationObjective(
            divergence=self.divergence,
            temperature=self.temperature,
            divergence_weight=self.weights[0],
            cross_entropy_weight=self.weights[1],
            skew_alpha=0.3,
            jsd_beta=0.2,
        )


@dataclass
class Tensors:
    """Whole tensors, the same on every rank."""

    case: Case
    hidden: Tensor = field(init=False)
    head: Tensor = field(init=False)
    teacher: Any = field(init=False)
    labels: Tensor = field(init=False)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, make = self.case, torch.Generator().manual_seed(7)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64).to(case.dtype)

        self.hidden, self.head = random(case.tokens, 6), random(case.padded, 6)
        dense = TeacherHidden(random(case.tokens, 10), random(case.padded, 10))
        if case.large:
            self.hidden[:, 0] = dense.hidden[:, 0] = case.large
            self.head[:, 0].sign_()
            dense.head[:, 0] = torch.where(torch.arange(case.padded) < 20, 1, -1)
        if case.teacher == "hidden":
            self.teacher = dense
        elif case.teacher == "logits":
            self.teacher = TeacherLogits(dense.hidden @ dense.head.t())
        else:
            log_probs, ids = teacher_log_probs(dense, case.temperature, case.vocab).topk(5)
            self.teacher = TeacherTopK(ids, log_probs.to(case.dtype), case.teacher)
        self.labels = torch.randint(case.vocab, (case.tokens,), generator=make)
        share = {"none": 1.1, "some": 0.7, "all": -0.1}[case.masked]
        self.mask = (torch.rand(case.tokens, generator=make) < share).float()
        self.labels[self.mask == 0] = -100

    def of_rank(self, rank: int, world: int) -> tuple[Tensor, Tensor, Any]:
        """hidden, head and teacher as one rank holds them."""
        cut = world if self.case.sequence_parallel else 1
        tokens = slice(*(self.case.tokens // cut * (rank % cut + i) for i in (0, 1)))
        columns = slice(*(self.case.padded // world * (rank + i) for i in (0, 1)))
        teacher = self.teacher
        if isinstance(teacher, TeacherHidden):
            teacher = TeacherHidden(teacher.hidden[tokens], teacher.head[columns])
        elif isinstance(teacher, TeacherLogits):
            teacher = TeacherLogits(teacher.logits[:, columns])
        return self.hidden[tokens], self.head[columns], teacher
