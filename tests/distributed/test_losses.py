"""The sharded losses against the dense reference, on 1, 2 and 4 gloo ranks."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.config.errors import UserError
from megatron_capgap.losses import (
    DistillationObjective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    distillation_loss,
    language_model_loss,
)
from megatron_capgap.losses.divergences import DIVERGENCES
from tests.support.pool import WorkerError, WorkerPool
from tests.support.reference_loss import reference_loss, teacher_log_probs

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


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
    scale: float = 1.0

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

        self.hidden, self.head = random(case.tokens, 6) * case.scale, random(case.padded, 6)
        dense = TeacherHidden(random(case.tokens, 10) * case.scale, random(case.padded, 10))
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


@dataclass
class Answer:
    """What one rank got."""

    loss: Tensor
    report: dict[str, Tensor]
    hidden_gradient: Tensor
    head_gradient: Tensor
    collectives: dict[str, int]


def run_case(case: Case, loss_scale: float = 1.0) -> Answer:
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, head, teacher = Tensors(case).of_rank(rank, world)
    labels, mask = (t := Tensors(case)).labels, t.mask
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    inputs = [hidden, head, labels, mask, *vars(teacher).values()]
    before = [x.detach().clone() for x in inputs if isinstance(x, Tensor)]
    counts = count_collectives()
    out = distillation_loss(
        hidden,
        head,
        teacher,
        labels,
        mask,
        objective=case.objective(),
        vocab_size=case.vocab,
        group=dist.group.WORLD,
        sequence_parallel=case.sequence_parallel,
        chunk_tokens=case.chunk_tokens,
    )
    forward = dict(counts)
    (out.loss_sum * loss_scale).backward()
    assert counts == forward, "a collective in the backward pass"
    after = [x for x in inputs if isinstance(x, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written"
    return Answer(out.loss_sum.detach(), out.report, hidden.grad, head.grad, forward)


def count_collectives() -> dict[str, int]:
    """Counts calls by name from now on; the calls still happen."""
    counts: dict[str, int] = {}
    for name in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_gather", "broadcast"):
        original = getattr(getattr(dist, name), "counted", getattr(dist, name))

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        counted.counted = original
        setattr(dist, name, counted)
    return counts


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def run_cases(cases: list[Case]) -> list[Answer]:
    return [run_case(case) for case in cases]


def check(case: Case, answers: list[Answer], loss_scale: float = 1.0) -> None:
    whole = Tensors(case)
    expected = reference_loss(
        whole.hidden, whole.head, whole.teacher, whole.labels, whole.mask, case.objective(), case.vocab
    )
    head = torch.cat([answer.head_gradient for answer in answers])
    hidden = [answer.hidden_gradient for answer in answers]
    hidden = [torch.cat(hidden)] if case.sequence_parallel else hidden
    limit = TOLERANCE[case.dtype]
    for answer in answers:
        assert torch.equal(answer.loss, answers[0].loss), "ranks disagree"
        assert error(answer.loss, expected.loss) <= limit
        assert error(answer.report["cross_entropy"], expected.cross_entropy) <= limit
        assert ("divergence" in answer.report) == (case.weights[0] > 0)
        assert error(answer.report.get("divergence", expected.divergence), expected.divergence) <= limit
    for gradient in hidden:
        assert error(gradient, expected.hidden_gradient * loss_scale) <= limit
    assert error(head, expected.head_gradient * loss_scale) <= limit
    assert not head[case.vocab :].any(), "padding has a gradient"


BASE = Case()
DENSE = [
    Case(divergence, temperature, teacher)
    for divergence in DIVERGENCES
    for temperature, teacher in ((1.0, "hidden"), (2.0, "logits"), (2.0, "hidden"))
]
SPARSE = [
    Case(divergence, temperature, tail)
    for divergence, row in DIVERGENCES.items()
    for temperature, tail in ((1.0, "ghost"), (2.0, "renormalise"), (1.0, "drop"))
    if tail != "drop" or row.finite_without_teacher
]
SHAPES = [
    replace(BASE, chunk_tokens=1),
    replace(BASE, chunk_tokens=1000, tokens=1),
    replace(BASE, masked="none", tokens=7),
    replace(BASE, vocab=64),
    replace(BASE, vocab=3),  # every rank but the first holds only padding
    replace(BASE, vocab=3, divergence="jsd", temperature=2.0),
    replace(BASE, weights=(0.0, 1.0)),
    replace(BASE, weights=(1.0, 0.0)),
    replace(BASE, divergence="reverse_kl", weights=(1.0, 0.0), temperature=0.5),
]
SEQUENCE = [
    replace(case, sequence_parallel=True)
    for case in (
        BASE,
        replace(BASE, divergence="reverse_kl", temperature=2.0),
        replace(BASE, divergence="jsd", teacher="logits"),
        replace(BASE, teacher="ghost", chunk_tokens=3),
        replace(BASE, teacher="renormalise", temperature=2.0),
    )
]
LOW = [
    replace(BASE, dtype=dtype, divergence=divergence, temperature=temperature)
    for dtype in (torch.float32, torch.bfloat16)
    for divergence in DIVERGENCES
    for temperature in (1.0, 2.0)
]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "cases", [DENSE, SPARSE, SHAPES, SEQUENCE, LOW], ids=["dense", "sparse", "shapes", "sequence", "low"]
)
def test_against_the_dense_reference(pool: WorkerPool, world: int, cases: list[Case]) -> None:
    answers = pool.run(run_cases, cases, world=world)
    for case, of_ranks in zip(cases, zip(*answers, strict=True), strict=True):
        check(case, list(of_ranks))
