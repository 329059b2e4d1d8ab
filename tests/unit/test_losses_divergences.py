"""Each row of the table of divergences, against its textbook definition and autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_capgap.config.schema import DIVERGENCES as NAMES
from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.divergences import DIVERGENCES
from tests.support.reference_loss import DENSE

OBJECTIVE = ObjectiveConfig(skew_alpha=0.3, jsd_beta=0.2)
every_row = pytest.mark.parametrize("name", DIVERGENCES)


def random_log_probs(seed: int, tokens: int = 3, vocab: int = 11) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, tokens, vocab, generator=make, dtype=torch.float64) * 3
    return tuple(logits.log_softmax(-1))


def evaluate(name: str, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    return DIVERGENCES[name].formula(log_p.exp(), log_q.exp(), log_p, log_q, OBJECTIVE)


def test_the_schema_the_table_and_the_reference_name_the_same_divergences() -> None:
    assert set(NAMES) == set(DIVERGENCES) == set(DENSE)


@every_row
@given(seed=st.integers(0, 2**31))
def test_value_and_pull_against_autograd(name: str, seed: int) -> None:
    log_p, logits = random_log_probs(seed)
    logits.requires_grad_()
    log_q = logits.log_softmax(-1)
    expected = DENSE[name](log_p, log_q, OBJECTIVE)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, logit_grad_term = evaluate(name, log_p, log_q.detach())
    torch.testing.assert_close(value.sum(-1), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        log_q.exp() * logit_grad_term.sum(-1, keepdim=True) - logit_grad_term, gradient, rtol=1e-10, atol=1e-12
    )


@every_row
def test_formulas_do_not_write_their_arguments(name: str) -> None:
    log_p, log_q = random_log_probs(0)
    arguments = [log_p.exp(), log_q.exp(), log_p, log_q]
    before = [x.clone() for x in arguments]
    DIVERGENCES[name].formula(*arguments, OBJECTIVE)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pull_is_exactly_zero_where_the_distributions_agree(name: str, dtype: torch.dtype) -> None:
    log_p = random_log_probs(1, vocab=1000)[0].to(dtype)
    value, logit_grad_term = evaluate(name, log_p, log_p.clone())
    assert not logit_grad_term.any()
    assert name == "soft_cross_entropy" or not value.any()


@every_row
def test_entries_that_underflow_stay_finite(name: str) -> None:
    log_p = torch.tensor([[0.0, -2e4, -2e4], [-2e4, 0.0, -2e4]])
    log_q = torch.tensor([[0.0, -2e4, -2e4], [0.0, -2e4, -2e4]])
    for result in evaluate(name, log_p, log_q):
        assert result.isfinite().all()


def chained(name: str, log_p: Tensor, log_q: Tensor, weight: str, cut: int = 4) -> Tensor:
    """sum_r W_r D(p / P_r, q / Q_r) + D(P, Q) for two shards."""
    shards = [[x[..., :cut], x[..., cut:]] for x in (log_p, log_q)]
    log_mass = [torch.stack([shard.logsumexp(-1) for shard in of_model], -1) for of_model in shards]
    outer = evaluate(name, *log_mass)[0].sum(-1)
    inner = [evaluate(name, *(of_model[r].log_softmax(-1) for of_model in shards))[0].sum(-1) for r in (0, 1)]
    weights = log_mass[0 if weight == "teacher" else 1].exp()
    return outer + (weights * torch.stack(inner, -1)).sum(-1)


@every_row
def test_the_chain_rule_holds_as_the_table_says(name: str) -> None:
    log_p, log_q = random_log_probs(2)
    whole = evaluate(name, log_p, log_q)[0].sum(-1)
    for weight in ("teacher", "student"):
        holds = torch.allclose(chained(name, log_p, log_q, weight), whole, rtol=1e-10)
        assert holds == (DIVERGENCES[name].shard_weight == weight)
