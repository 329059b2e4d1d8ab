"""The sharded losses against the dense reference, on 1, 2 and 4 gloo ranks."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_capgap.config.schema import WITHOUT_CHAIN_RULE
from megatron_capgap.losses import (
    DistillationObjective,
    Loss,
    TeacherHidden,
    distillation_loss,
    language_model_loss,
)
from megatron_capgap.losses.divergences import DIVERGENCES
from tests.support.collectives import counted
from tests.support.loss_cases import Case, Tensors
from tests.support.pool import WorkerError, WorkerPool
from tests.support.reference_loss import reference_loss

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Answer:
    """What one rank got."""

    loss: Tensor
    report: dict[str, Tensor]
    hidden_gradient: Tensor
    head_gradient: Tensor


def leaves(case: Case) -> tuple[Tensors, Tensor, Tensor, Any]:
    """The whole tensors; and this rank's hidden and head, which want gradients, and teacher."""
    whole = Tensors(case)
    hidden, head, teacher = whole.of_rank(dist.get_rank(), dist.get_world_size())
    return whole, hidden.clone().requires_grad_(), head.clone().requires_grad_(), teacher


def distil(case: Case, whole: Tensors, hidden: Tensor, head: Tensor, teacher: Any) -> Loss:
    return distillation_loss(
        hidden,
        head,
        teacher,
        whole.labels,
        whole.mask,
        objective=case.objective(),
        vocab_size=case.vocab,
        group=dist.group.WORLD,
        sequence_parallel=case.sequence_parallel,
        chunk_tokens=case.chunk_tokens,
        kernels=case.kernels,
    )


def run_case(case: Case, loss_scale: float = 1.0) -> Answer:
    whole, hidden, head, teacher = leaves(case)
    inputs = [x for x in (hidden, head, whole.labels, whole.mask, *vars(teacher).values()) if isinstance(x, Tensor)]
    before = [x.detach().clone() for x in inputs]
    out = distil(case, whole, hidden, head, teacher)
    (out.loss_sum * loss_scale).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True)), "an input was written"
    return Answer(out.loss_sum.detach(), out.report, hidden.grad, head.grad)


def run_cases(cases: list[Case]) -> list[Answer]:
    return [run_case(case) for case in cases]


def run_counted(cases: list[Case]) -> list[dict[str, int]]:
    """The collectives of the forward pass; of the backward pass there must be none."""
    counts = []
    for case in cases:
        out, forward = counted(partial(distil, case, *leaves(case)))
        assert counted(out.loss_sum.backward)[1] == {}
        counts.append(forward)
    return counts


@dataclass
class Plain:
    """What one rank got from the cross-entropy alone."""

    loss: Tensor
    report: dict[str, Tensor]
    hidden_gradient: Tensor
    head_gradient: Tensor
    forward_only: Tensor
    collectives_forward_only: dict[str, int]


def run_language_model(case: Case) -> Plain:
    whole, hidden, head, _ = leaves(case)
    run = partial(
        language_model_loss,
        hidden,
        head,
        whole.labels,
        whole.mask,
        vocab_size=case.vocab,
        group=dist.group.WORLD,
        sequence_parallel=case.sequence_parallel,
        chunk_tokens=case.chunk_tokens,
    )
    out = run()
    out.loss_sum.backward()
    with torch.no_grad():
        again, collectives = counted(run)
    return Plain(out.loss_sum.detach(), out.report, hidden.grad, head.grad, again.loss_sum, collectives)


def run_equal_models(cases: list[Case]) -> list[float]:
    """The teacher is the student itself: the largest entry of the gradients."""
    largest = []
    for case in cases:
        whole, hidden, head, _ = leaves(case)
        distil(case, whole, hidden, head, TeacherHidden(hidden.detach(), head.detach())).loss_sum.backward()
        largest.append(max(leaf.grad.abs().max().item() for leaf in (hidden, head)))
    return largest


def run_megatron_cross_entropy() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient of the logits' shard: Megatron's own cross-entropy, and ours through an identity head."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    rank, world = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    make = torch.Generator().manual_seed(3)
    logits = torch.randn(11, 16, generator=make)
    labels = torch.randint(16, (11,), generator=make)
    columns = slice(16 // world * rank, 16 // world * (rank + 1))
    shard = logits[:, columns].clone().requires_grad_()
    theirs = vocab_parallel_cross_entropy(shard.clone(), labels).sum()
    theirs.backward()
    hidden = logits.clone().requires_grad_()
    ours = language_model_loss(
        hidden, torch.eye(16)[columns], labels, torch.ones(11), vocab_size=16, group=dist.group.WORLD
    ).loss_sum
    ours.backward()
    return theirs.detach(), shard.grad, ours.detach(), hidden.grad[:, columns]


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(case: Case, answers: list[Answer], loss_scale: float = 1.0) -> None:
    whole = Tensors(case)
    expected = reference_loss(
        whole.hidden, whole.head, whole.teacher, whole.labels, whole.mask, case.objective(), case.vocab
    )
    head = torch.cat([answer.head_gradient for answer in answers])
    hidden = [answer.hidden_gradient for answer in answers]
    hidden = [torch.cat(hidden)] if case.sequence_parallel else hidden
    # A large logit cannot be more exact than its last digit.
    limit = max(TOLERANCE[case.dtype], case.large * torch.finfo(case.dtype).eps)
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
    *(
        replace(BASE, divergence=divergence, tokens=tokens)
        for divergence in ("jsd", "reverse_kl")
        for tokens in (1, 29)
    ),
]
LARGE = [
    Case(divergence, temperature, teacher, dtype, large=1e4)
    for divergence in DIVERGENCES
    for temperature, teacher, dtype in (
        (1.0, "hidden", torch.float64),
        (2.0, "logits", torch.float64),
        (2.0, "hidden", torch.float32),
    )
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
] + [
    replace(case, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for case in (
        *SEQUENCE,
        Case("forward_kl", 2.0, "ghost"),
        Case("jsd", 1.0, "drop"),
        Case("reverse_kl", 1.0, "renormalise"),
    )
]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "cases",
    [DENSE, SPARSE, SHAPES, LARGE, SEQUENCE, LOW],
    ids=["dense", "sparse", "shapes", "large", "sequence", "low"],
)
def test_against_the_dense_reference(pool: WorkerPool, world: int, cases: list[Case]) -> None:
    answers = pool.run(run_cases, cases, world=world)
    for case, of_ranks in zip(cases, zip(*answers, strict=True), strict=True):
        check(case, list(of_ranks))


# In Triton's interpreter: every row with every kind of shard, and each of the other properties with some row. Three
# ranks have 22 columns of the padded vocabulary each; of a vocabulary of 40 the last has none, of 3 only the first has.
KERNELS = [
    Case(divergence, temperature, teacher, tokens=6, chunk_tokens=4, padded=66, vocab=vocab, masked=masked)
    for divergence, temperature, teacher, vocab, masked in (
        ("forward_kl", 1.0, "hidden", 53, "some"),
        ("forward_kl", 2.5, "hidden", 3, "some"),
        ("reverse_kl", 2.5, "hidden", 40, "some"),
        ("reverse_kl", 1.0, "logits", 3, "none"),
        ("jsd", 1.0, "hidden", 40, "none"),
        ("jsd", 2.5, "logits", 53, "some"),
        ("skew_forward_kl", 2.5, "hidden", 40, "some"),
        ("skew_reverse_kl", 1.0, "hidden", 53, "all"),
        ("total_variation", 2.5, "hidden", 3, "none"),
        ("soft_cross_entropy", 1.0, "hidden", 40, "some"),
        ("reverse_kl", 2.5, "ghost", 40, "some"),
        ("jsd", 1.0, "renormalise", 53, "none"),
        ("forward_kl", 1.0, "drop", 53, "some"),
    )
]
KERNELS += [
    replace(KERNELS[0], weights=(0.0, 1.0)),
    *(replace(KERNELS[i], dtype=torch.bfloat16) for i in (0, 4, 10)),
    *(replace(KERNELS[i], large=1e4) for i in (0, 2, 4)),
]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_triton_kernels_against_the_dense_reference(pool: WorkerPool, world: int) -> None:
    cases = [replace(case, kernels="triton", sequence_parallel=i % 2 == 0) for i, case in enumerate(KERNELS)]
    answers = pool.run(run_cases, cases, world=world)
    for case, of_ranks in zip(cases, zip(*answers, strict=True), strict=True):
        check(case, list(of_ranks))


@pytest.mark.matrix
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_triton_kernels_in_every_combination(pool: WorkerPool, divergence: str, world: int) -> None:
    cases = [
        replace(
            KERNELS[0], divergence=divergence, temperature=temperature, vocab=vocab, masked=masked, kernels="triton"
        )
        for temperature in (1.0, 2.5)
        for vocab in (66, 53, 40, 3)
        for masked in ("none", "some", "all")
    ]
    answers = pool.run(run_cases, cases, world=world)
    for case, of_ranks in zip(cases, zip(*answers, strict=True), strict=True):
        check(case, list(of_ranks))


CASES = st.builds(
    Case,
    divergence=st.sampled_from(list(DIVERGENCES)),
    temperature=st.sampled_from([0.7, 1.0, 3.0]),
    teacher=st.sampled_from(["hidden", "logits", "ghost", "renormalise", "drop"]),
    tokens=st.integers(1, 5).map(lambda quarter: 4 * quarter),
    chunk_tokens=st.integers(1, 24),
    vocab=st.integers(7, 64),
    sequence_parallel=st.booleans(),
    masked=st.sampled_from(["none", "some", "all"]),
    weights=st.tuples(st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 0.6])),
).filter(lambda case: case.teacher != "drop" or DIVERGENCES[case.divergence].finite_without_teacher)


@given(case=CASES, world=st.sampled_from([2, 4]))
def test_any_case(pool: WorkerPool, case: Case, world: int) -> None:
    check(case, pool.run(run_case, case, world=world))


@pytest.mark.parametrize("world", [2, 4])
def test_the_incoming_gradient_scales(pool: WorkerPool, world: int) -> None:
    check(BASE, pool.run(run_case, BASE, 0.125, world=world), 0.125)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", [BASE, SEQUENCE[0], replace(BASE, dtype=torch.bfloat16)], ids=["", "sequence", "bf16"])
def test_cross_entropy_alone(pool: WorkerPool, world: int, case: Case) -> None:
    answers = pool.run(run_language_model, case, world=world)
    objective = DistillationObjective(divergence_weight=0.0, cross_entropy_weight=1.0)
    whole = Tensors(case)
    expected = reference_loss(whole.hidden, whole.head, None, whole.labels, whole.mask, objective, case.vocab)
    cut = [answer.hidden_gradient for answer in answers]
    gradient = torch.cat(cut) if case.sequence_parallel else cut[0]
    limit = TOLERANCE[case.dtype]
    assert error(answers[0].loss, expected.loss) <= limit
    assert error(gradient, expected.hidden_gradient) <= limit
    assert error(torch.cat([answer.head_gradient for answer in answers]), expected.head_gradient) <= limit
    for answer in answers:
        assert set(answer.report) == {"cross_entropy"} and torch.equal(answer.report["cross_entropy"], answer.loss)
        assert torch.equal(answer.forward_only, answer.loss)


def test_forward_only_reduces_no_gradient(pool: WorkerPool) -> None:
    for case, gathers in ((BASE, 4), (SEQUENCE[0], 8)):
        answer = pool.run(run_language_model, case, world=2)[0]
        assert answer.collectives_forward_only == {"all_gather": gathers}


@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_collectives(pool: WorkerPool, world: int) -> None:
    """28 tokens are 4 chunks of at most 9, and with sequence parallelism, which rounds down to a multiple of the
    ranks, 4 chunks of at most 8. Without a chain rule they are walked over in pairs, with two gathers each."""
    chunks, dense = 4, {}
    for divergence, row in DIVERGENCES.items():
        walked = chunks if row.shard_weight else chunks // 2
        dense[Case(divergence)] = {"all_gather": chunks, "all_reduce": 1}
        dense[Case(divergence, sequence_parallel=True)] = {
            "all_gather": chunks + 2 * walked,  # the hidden states of both models
            "reduce_scatter": walked,
        }
    odd = {Case("jsd", tokens=27): {"all_gather": 4, "all_reduce": 1}}  # the second pair is one chunk
    sparse = {Case("jsd", teacher=tail): {"all_gather": chunks, "all_reduce": 1} for tail in ("renormalise", "ghost")}
    expected = dense | odd | sparse
    if world == 2:
        expected |= {
            replace(case, kernels="triton"): expected[case]
            for case in (Case("reverse_kl"), Case("jsd"), Case("jsd", sequence_parallel=True))
        }
    for of_rank in pool.run(run_counted, list(expected), world=world):
        assert dict(zip(expected, of_rank, strict=True)) == expected


def test_the_rows_that_need_one_collective() -> None:
    one = {name for name, row in DIVERGENCES.items() if row.shard_weight}
    assert one == {"forward_kl", "reverse_kl", "soft_cross_entropy"} == set(DIVERGENCES) - set(WITHOUT_CHAIN_RULE)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equal_models_give_exactly_zero(pool: WorkerPool, world: int) -> None:
    cases = [
        Case(divergence, temperature, dtype=dtype, weights=(1.0, 0.0))
        for divergence in DIVERGENCES
        for temperature in (1.0, 2.0)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    if world == 2:
        cases += [
            replace(case, kernels="triton", tokens=4)
            for case in cases
            if case.temperature == 2 or case.divergence == "jsd"
        ]
    for largest in pool.run(run_equal_models, cases, world=world):
        assert largest == [0.0] * len(cases)


def test_against_megatrons_cross_entropy(pool: WorkerPool) -> None:
    for theirs, their_gradient, ours, our_gradient in pool.run(run_megatron_cross_entropy, world=2):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)


def run_teacher_cut_elsewhere(case: Case) -> None:
    whole, hidden, head, teacher = leaves(case)
    distil(case, whole, hidden, head, TeacherHidden(teacher.hidden, torch.cat([teacher.head, teacher.head[:4]])))


@pytest.mark.parametrize(
    ("run", "case", "message"),
    [
        (run_case, replace(BASE, vocab=65), "vocab_size 65 does not fit 2 LM-head shard(s) of 32 rows (64 in total)"),
        (run_teacher_cut_elsewhere, BASE, "teacher LM head: 36 rows on this rank, but the student's has 32"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(pool: WorkerPool, run: Any, case: Case, message: str) -> None:
    with pytest.raises(WorkerError) as caught:
        pool.run(run, case, world=2)
    assert set(caught.value.failures) == {0, 1}
    assert all(message in failure.reason for failure in caught.value.failures.values())
