"""Drawing tokens: how often each comes, what is left out, and that a draw is a function of its numbers."""

from collections import Counter

import pytest
import torch

from megatron_capgap.common.errors import UserError
from megatron_capgap.generation.sampling import Sampling, choose

CHANCES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
DRAWS = 4000


def counted(sampling: Sampling) -> dict[int, float]:
    """How often each token comes."""
    drawn = choose(CHANCES.log().float().expand(DRAWS, -1), sampling, [(n // 50, n % 50) for n in range(DRAWS)])
    return {int(token or 0): count / DRAWS for token, count in Counter(drawn).items()}


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4]),
        (Sampling(temperature=0.5), [0, 1, 2, 3, 4]),
        (Sampling(temperature=1.0, top_k=2), [1, 3]),
        (Sampling(temperature=2.0, top_k=3), [1, 3, 4]),
        (Sampling(temperature=1.0, top_p=0.5), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.86), [0, 1, 3, 4]),
        (Sampling(temperature=1.0, top_p=0.001), [1]),
        # Of the three likeliest, the first two have 0.65 / 0.85 of the probability.
        (Sampling(temperature=1.0, top_k=3, top_p=0.75), [1, 3]),
        (Sampling(temperature=1.0, top_k=99), [0, 1, 2, 3, 4]),
    ],
)
def test_each_token_comes_as_often_as_it_should(sampling: Sampling, kept: list[int]) -> None:
    weights = {token: CHANCES[token].item() ** (1 / sampling.temperature) for token in kept}
    found = counted(sampling)
    assert sorted(found) == kept
    for token, weight in weights.items():
        assert found[token] == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_greedy_takes_the_likeliest() -> None:
    assert choose(CHANCES[None].log(), Sampling(top_k=3, top_p=0.1), [(0, 0)]) == [1]


def test_a_draw_depends_on_its_numbers_alone() -> None:
    flat = torch.zeros(6, 10_000)
    draws = [(0, 0), (0, 1), (1, 0), (0, 0), (11, 1), (1, 11)]
    first = choose(flat, Sampling(temperature=1.0, seed=1), draws)
    assert first[0] == first[3] and len(set(first)) == 5
    assert choose(flat[:1], Sampling(temperature=1.0, seed=1), draws[2:3]) == first[2:3]
    assert choose(flat, Sampling(temperature=1.0, seed=2), draws) != first


def test_logits_that_are_not_finite() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 1], logits[2, 3] = float("nan"), float("inf")
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        first, second, third = choose(logits, sampling, [(0, 0), (1, 0), (2, 0)])
        assert first is None and second is not None and third is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature: nan must be at least 0"),
        ({"top_k": -2}, "top_k: -2 is negative"),
        ({"top_p": 0.0}, "top_p: 0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p: 1.5 must be above 0"),
    ],
)
def test_numbers_out_of_range(numbers: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**numbers)
