"""Choice of the next token from the logits: greedy or sampled."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_capgap.common.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice of the next token.

    Raises:
        UserError: a number is out of range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 selects the most probable token, and all other settings are ignored."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens whose total probability is at least this, after top_k."""
    seed: int = 0
    """A draw depends on the seed, the prompt's number and the number of new tokens so far; not on layout or batch."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: {self.temperature} must be at least 0; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; 0 samples from all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} must be above 0 and at most 1; 1 samples from all tokens")


GREEDY = Sampling()


def choose(logits: Tensor, sampling: Sampling, draws: Sequence[tuple[int, int]]) -> list[int | None]:
    """The next token of each row.

    Args:
        logits: `[b, v]` over the real vocabulary.
        sampling: settings.
        draws: for each row its prompt's number and its number of new tokens so far, which identify the draw.

    Returns:
        b ids; None where a row's logits are not finite.
    """
    finite = logits.isfinite().all(-1).tolist()
    if sampling.temperature == 0:
        chosen = logits.argmax(-1).tolist()
    else:
        # float64 on the CPU, one number per row: draws are the same on every device; layouts differ by rounding only.
        likely, ids = (logits.double().cpu() / sampling.temperature).sort(stable=True, dim=-1, descending=True)
        chances = cut(likely.softmax(-1), sampling)
        marks = torch.tensor([[random.Random(f"{sampling.seed} {n} {k}").random()] for n, k in draws]).double()
        sums = chances.cumsum(-1)
        # The cumulative sum reaches its last value at the last token that may be drawn, and the mark is below it.
        places = torch.searchsorted(sums, marks * sums[:, -1:], right=True).clamp_(max=ids.shape[1] - 1)
        chosen = ids.gather(-1, places)[:, 0].tolist()
    return [token if fine else None for token, fine in zip(chosen, finite, strict=True)]


def cut(chances: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities `[b, v]`, descending, set to 0 where top_k and top_p exclude a token; not renormalised."""
    if sampling.top_k:
        chances = chances.clone()
        chances[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        share = chances / chances.sum(-1, keepdim=True)
        before = share.cumsum(-1) - share
        chances = torch.where(before < sampling.top_p, chances, 0.0)
    return chances
