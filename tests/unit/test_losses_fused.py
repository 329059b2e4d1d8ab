"""The losses on one rank: properties over shapes and masks, edges, memory, and what they refuse."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_capgap.common.errors import UserError
from megatron_capgap.losses import (
    DistillationObjective,
    Loss,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    distillation_loss,
    language_model_loss,
)
from megatron_capgap.losses.divergences import DIVERGENCES
from megatron_capgap.losses.vocab_shard import BLOCK_OF_A_CORE, blocks_in_cache
from tests.support.memory import allocations
from tests.support.reference_loss import reference_loss

distil = partial(distillation_loss, group=None)


def tensors(tokens: int, vocab: int, padded: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """hidden, head (leaves), teacher, labels, mask."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

    return {
        "hidden": random(tokens, 5).requires_grad_(),
        "head": random(padded, 5).requires_grad_(),
        "teacher": TeacherHidden(random(tokens, 8), random(padded, 8)),
        "labels": torch.randint(vocab, (tokens,), generator=make),
        "mask": (torch.rand(tokens, generator=make) < 0.7).float(),
    }


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@given(
    tokens=st.integers(1, 20),
    vocab=st.integers(2, 40),
    padding=st.integers(0, 9),
    chunk_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    divergence=st.sampled_from(list(DIVERGENCES)),
    weights=st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.6])),
    mask=st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=20, max_size=20),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_mask(
    tokens: int,
    vocab: int,
    padding: int,
    chunk_tokens: int,
    temperature: float,
    divergence: str,
    weights: tuple[float, float],
    mask: list[float],
    seed: int,
) -> None:
    t = tensors(tokens, vocab, vocab + padding, seed=seed)
    t["mask"] = torch.tensor(mask[:tokens], dtype=torch.float64)
    t["labels"][t["mask"] == 0] = -100
    objective = DistillationObjective(divergence, temperature, *weights)
    out = distil(*t.values(), objective=objective, vocab_size=vocab, chunk_tokens=chunk_tokens)
    out.loss_sum.backward()
    expected = reference_loss(*t.values(), objective, vocab)
    assert error(out.loss_sum, expected.loss) <= 1e-10
    assert error(t["hidden"].grad, expected.hidden_gradient) <= 1e-10
    assert error(t["head"].grad, expected.head_gradient) <= 1e-10
    assert out.num_tokens == t["mask"].sum()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_all_masked_micro_batch_gives_zero(divergence: str, temperature: float) -> None:
    t = tensors(6, 9, 12, torch.float32)
    t["labels"].fill_(-100)
    t["mask"].zero_()
    out = distil(*t.values(), objective=DistillationObjective(divergence, temperature), vocab_size=9, chunk_tokens=4)
    out.loss_sum.backward()
    assert out.loss_sum == 0 and out.num_tokens == 0 and not any(x.any() for x in out.report.values())
    assert not t["hidden"].grad.any() and not t["head"].grad.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_of_ten_thousand_stay_finite(divergence: str, temperature: float) -> None:
    t = tensors(6, 9, 12, torch.float32)
    with torch.no_grad():
        t["hidden"].copy_(t["hidden"].sign() * 5e3)
    dense = TeacherHidden(-4e3 * t["teacher"].hidden, t["teacher"].head)
    sparse = TeacherTopK(torch.arange(3).repeat(6, 1), torch.tensor([[-1e4, -2e4, 0.0]] * 6), "ghost")
    for teacher in (dense, sparse):
        t["hidden"].grad = t["head"].grad = None
        out = distil(
            t["hidden"], t["head"], teacher, t["labels"], t["mask"],
            objective=DistillationObjective(divergence, temperature), vocab_size=9,
        )  # fmt: skip
        out.loss_sum.backward()
        assert out.loss_sum.isfinite() and all(x.isfinite() for x in out.report.values())
        assert t["hidden"].grad.isfinite().all() and t["head"].grad.isfinite().all()


def test_without_gradients_no_gradient_work_is_done() -> None:
    t = tensors(64, 500, 500, torch.float32)
    run = partial(distil, *t.values(), objective=DistillationObjective(), vocab_size=500, chunk_tokens=8)
    with_gradients, held, _ = allocations(run)
    with torch.no_grad():
        without, held_without, _ = allocations(run)
    assert torch.equal(without.loss_sum, with_gradients.loss_sum) and not without.loss_sum.requires_grad
    assert held > 500 * 5 * 4 and held_without < 200


@pytest.mark.parametrize("rows", [9, 10, 20])
def test_teacher_and_student_may_be_padded_differently(rows: int) -> None:
    t = tensors(6, 9, 12)
    hidden, head = t["teacher"].hidden, torch.randn(rows, 8, dtype=torch.float64)
    for teacher in (TeacherHidden(hidden, head), TeacherLogits(hidden @ head.t())):
        t["hidden"].grad, t["teacher"] = None, teacher
        distil(*t.values(), objective=DistillationObjective(), vocab_size=9).loss_sum.backward()
        expected = reference_loss(*t.values(), DistillationObjective(), 9)
        assert error(t["hidden"].grad, expected.hidden_gradient) <= 1e-10


def test_only_the_wanted_gradient_is_made() -> None:
    t = tensors(7, 9, 12)
    whole = reference_loss(*t.values(), DistillationObjective(), 9)
    for frozen, trained, expected in (
        ("head", "hidden", whole.hidden_gradient),
        ("hidden", "head", whole.head_gradient),
    ):
        t[frozen].requires_grad_(False)
        t[trained].grad = t[frozen].grad = None
        distil(*t.values(), objective=DistillationObjective(), vocab_size=9).loss_sum.backward()
        assert error(t[trained].grad, expected) <= 1e-10 and t[frozen].grad is None
        t[frozen].requires_grad_()


def test_the_incoming_gradient_scales_and_a_second_backward_is_refused() -> None:
    t = tensors(7, 9, 12)
    out = distil(*t.values(), objective=DistillationObjective(), vocab_size=9)
    (out.loss_sum / 8).backward(retain_graph=True)
    assert error(t["head"].grad * 8, reference_loss(*t.values(), DistillationObjective(), 9).head_gradient) <= 1e-10
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss_sum.backward()


def test_tied_embeddings_add_up() -> None:
    """The head is also the embedding that made the hidden states: one parameter, two gradients."""
    t = tensors(7, 9, 12)
    tokens = torch.arange(7)

    def gradient(loss: Any) -> Tensor:
        weight = t["head"].detach().clone().requires_grad_()
        loss(torch.nn.functional.embedding(tokens, weight).tanh(), weight).backward()
        return weight.grad

    def dense(hidden: Tensor, head: Tensor) -> Tensor:
        logits = hidden @ head[:9].t()
        return (torch.nn.functional.cross_entropy(logits, t["labels"], reduction="none") * t["mask"]).sum()

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        return language_model_loss(hidden, head, t["labels"], t["mask"], vocab_size=9, group=None).loss_sum

    assert error(gradient(ours), gradient(dense)) <= 1e-10


def test_into_main_grad_needs_no_buffer() -> None:
    """The gradient adds to what is there; the parameter itself gets none, since no DDP asks for one."""
    t = tensors(64, 500, 512)
    head = t["head"]
    head.main_grad = torch.ones_like(head)
    run = partial(distil, *t.values(), objective=DistillationObjective(), vocab_size=500, into_main_grad=True)
    out, held, _ = allocations(run)
    assert held < t["hidden"].nbytes + 500
    out.loss_sum.backward()
    expected = reference_loss(*t.values(), DistillationObjective(), 500)
    assert error(head.main_grad - 1, expected.head_gradient) <= 1e-10 and head.grad is None
    assert error(t["hidden"].grad, expected.hidden_gradient) <= 1e-10


def test_into_main_grad_refuses_a_scaled_loss_and_a_head_without_main_grad() -> None:
    t = tensors(7, 9, 12)
    run = partial(distil, *t.values(), objective=DistillationObjective(), vocab_size=9, into_main_grad=True)
    with pytest.raises(UserError, match="into_main_grad: the LM head has no main_grad"):
        run()
    t["head"].main_grad = torch.zeros_like(t["head"])
    with pytest.raises(RuntimeError, match="the loss must have a gradient of 1"):
        (run().loss_sum / 8).backward()
    with torch.no_grad():
        run()


def test_the_head_gradient_is_rounded_once() -> None:
    """bf16: many chunks must not lose more than one does."""
    t = tensors(512, 50, 50, torch.bfloat16)
    expected = reference_loss(*t.values(), DistillationObjective(), 50).head_gradient
    errors = []
    for chunk_tokens in (512, 2):
        t["head"].grad = None
        distil(
            *t.values(), objective=DistillationObjective(), vocab_size=50, chunk_tokens=chunk_tokens
        ).loss_sum.backward()
        errors.append(error(t["head"].grad, expected))
    assert errors[1] < 1.2 * errors[0] < 1e-2


def test_memory_grows_with_the_chunk_and_not_with_the_tokens() -> None:
    """Held: the two gradients. At the peak: besides them two chunks of logits and the temporaries of a block."""
    vocab, width, chunk = 3000, 5, 32
    for tokens in (64, 640):
        t = tensors(tokens, vocab, vocab, torch.float32)
        run = partial(distil, *t.values(), objective=DistillationObjective(), vocab_size=vocab, chunk_tokens=chunk)
        _, held, peak = allocations(run)
        gradients = 4 * width * (vocab + tokens)
        assert gradients <= held <= gradients + 1000
        block = BLOCK_OF_A_CORE * torch.get_num_threads()
        assert peak <= gradients + 4 * (2 * chunk * vocab + 6 * block) + 20000


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_block_has_work_for_every_thread(threads: int) -> None:
    """Torch gives no thread fewer than 2^15 entries; the rest of the threads would stand by."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in (1, 8192, 16000, 50000, 151936):
            sizes = [block.numel() for (block,) in blocks_in_cache(torch.empty(8 * threads, 1).expand(-1, width))]
            whole = 8 * threads * width
            assert sum(sizes) == whole and sizes[0] >= min(whole, 2**15 * threads)
    finally:
        torch.set_num_threads(before)


def test_fill_of_a_short_list_weighs_nothing() -> None:
    t = tensors(6, 9, 12)
    log_probs, ids = torch.randn(6, 9, dtype=torch.float64).log_softmax(1).topk(3)
    for tail in ("drop", "renormalise", "ghost"):
        losses = []
        for fill in (0, 2):
            teacher = TeacherTopK(
                torch.cat([ids, torch.full((6, fill), -1)], 1),
                torch.cat([log_probs, torch.full((6, fill), -torch.inf)], 1),
                tail,
            )
            t["hidden"].grad = None
            out = distil(
                t["hidden"], t["head"], teacher, t["labels"], t["mask"], objective=DistillationObjective(), vocab_size=9
            )
            out.loss_sum.backward()
            losses.append((out.loss_sum.detach(), t["hidden"].grad))
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*losses, strict=True))


def wrong(**changes: Any) -> Loss:
    t = tensors(6, 9, 12)
    options = {"objective": DistillationObjective(), "vocab_size": 9, "chunk_tokens": 4}
    for key, value in changes.items():
        (options if key in options else t)[key] = value
    return distil(*t.values(), **options)


def sparse_teacher(ids: list[int], log_probs: list[float], tail: str = "drop") -> TeacherTopK:
    return TeacherTopK(torch.tensor([ids] * 6), torch.tensor([log_probs] * 6, dtype=torch.float64), tail)


COUNTED = {"mask": torch.ones(6)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": TeacherHidden(torch.ones(6, 8), torch.ones(8, 8))},
            "8 rows on this rank, but the student's has 12",
        ),
        ({"teacher": TeacherHidden(torch.ones(6, 7), torch.ones(12, 8))}, "7 wide, its LM head 8"),
        ({"teacher": TeacherHidden(torch.ones(5, 8), torch.ones(12, 8))}, "5 tokens, but there are 6 labels"),
        ({"teacher": TeacherLogits(torch.ones(6, 8))}, "shape (6, 8), but 6 labels"),
        ({"teacher": sparse_teacher([1, 2, 3], [-1.0, -2.0])}, "ids (6, 3) and log_probs (6, 2)"),
        ({"teacher": sparse_teacher([9], [0.0])}, "teacher top-k ids: 9 is outside the vocabulary of 9"),
        ({"teacher": sparse_teacher([0], [0.0], "all")}, "tail 'all' is unknown; valid values: drop"),
        ({"vocab_size": 13}, "vocab_size 13 does not fit 1 LM-head shard(s) of 12 rows"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 9]), **COUNTED}, "labels: 9 is outside the vocabulary of 9"),
        ({"labels": torch.tensor([-100, 1, 2, 3, 4, 8]), **COUNTED}, "labels: -100 is outside"),
        ({"labels": torch.zeros(5).long()}, "need labels and mask of [6], not (5,) and (6,)"),
        ({"hidden": torch.ones(6, 4, dtype=torch.float64)}, "4 wide, but its LM head is 5 wide"),
        ({"chunk_tokens": 0}, "chunk_tokens: 0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        wrong(**changes)
    assert "\n" not in str(caught.value)


def test_dropping_the_tail_under_reverse_kl_is_refused() -> None:
    objective = DistillationObjective("reverse_kl")
    with pytest.raises(UserError, match="reverse_kl is infinite where the teacher has probability 0"):
        wrong(teacher=sparse_teacher([0], [0.0], "drop"), objective=objective)
