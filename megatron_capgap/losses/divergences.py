"""The divergences of the teacher's distribution p and the student's q: one function and one row of a table each.

A formula sees p, q and their logarithms at some entries of the vocabulary (any shape, all four alike) and
returns, entry by entry and without writing its arguments,

    value   what the entry adds to D(p, q) = sum_v value_v
    pull    -q_v * d value_v / d q_v, from which the gradient follows: with q = softmax(s),
            d D / d s_v = q_v * sum_w pull_w - pull_v

Any multiple of q may be added to the pull without changing that gradient. Each formula uses this freedom so
that its pull is exactly zero where p equals q: a student that agrees with its teacher gets a gradient of
zero, not of rounding errors.

Under tensor parallelism a rank holds a shard of the vocabulary, where p has the mass P_r and, inside the
shard, the distribution p/P_r (likewise Q_r and q/Q_r for the student). The Kullback-Leibler family obeys the
chain rule

    D(p, q) = sum_r W_r * D(p/P_r, q/Q_r) + D(P, Q)            W = P or W = Q

so each rank works with its own normaliser and one collective of a few numbers a token completes the sum. For
the others the entries need the global normaliser first: two collectives that depend on each other, each of which
carries two chunks. (The second could travel with the first of the next chunk instead: as many logits alive, as many
messages.) The column `shard_weight` says which W, or None.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_capgap.config.schema import ObjectiveConfig

Formula = Callable[[Tensor, Tensor, Tensor, Tensor, ObjectiveConfig], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Divergence:
    """One row of the table."""

    formula: Formula
    """(p, q, log p, log q, objective) -> (value, pull), as described at the top of this file."""
    shard_weight: Literal["teacher", "student"] | None = None
    """W of the chain rule; None where there is none; then the schema names the row in WITHOUT_CHAIN_RULE."""
    finite_without_teacher: bool = True
    """Whether D stays finite where p is 0 and q is not (a sparse teacher's dropped tail)."""


def forward_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q): the classic of Hinton et al. (2015); covers the teacher's modes."""
    return (log_p - log_q).mul_(p), p - q


def reverse_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q (log q - log p): MiniLLM (Gu et al., 2023); seeks the teacher's modes."""
    pull = (log_p - log_q).mul_(q)
    return -pull, pull


def soft_cross_entropy(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """H(p, q) = - sum p log q: forward_kl plus the teacher's entropy, so the same gradient; MiniMA's loss."""
    return (p * log_q).neg_(), p - q


def jsd(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, b = jsd_beta: the generalised
    Jensen-Shannon divergence of GKD (Agarwal et al., 2023); symmetric at b = 0.5."""
    b = objective.jsd_beta
    mixture = torch.lerp(q, p, b)
    pull = _log_ratio(mixture, q).mul_(q).mul_(1 - b)
    return _log_ratio(mixture, p).mul_(p).mul_(-b).sub_(pull), pull


def skew_forward_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = a p + (1 - a) q, a = skew_alpha: DistiLLM (Ko et al., 2024); bounded by -log a."""
    a = objective.skew_alpha
    mixture = torch.lerp(q, p, a)
    pull = _over(p - q, mixture).mul_(q).mul_((1 - a) ** 2)
    return _log_ratio(mixture, p).mul_(p).neg_(), pull


def skew_reverse_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """KL(q || m) with m = (1 - a) p + a q, a = skew_alpha: DistiLLM (Ko et al., 2024); bounded by -log a."""
    a = objective.skew_alpha
    mixture = torch.lerp(p, q, a)
    towards = _log_ratio(mixture, q).mul_(q)
    return -towards, _over(p - q, mixture).mul_(q).mul_(-a * (1 - a)).add_(towards)


def total_variation(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """1/2 sum |p - q|: the largest difference in the probability of any event."""
    difference = p - q
    return difference.abs().mul_(0.5), difference.sign().mul_(q).mul_(0.5)


def _over(numerator: Tensor, mixture: Tensor) -> Tensor:
    """numerator / mixture; 0 where both distributions have underflowed to 0."""
    return numerator.div_(mixture.clamp_min(torch.finfo(mixture.dtype).tiny))


def _log_ratio(mixture: Tensor, part: Tensor) -> Tensor:
    """log(mixture / part): exactly 0 where they are equal, finite where either has underflowed."""
    tiny = torch.finfo(mixture.dtype).tiny
    return mixture.clamp_min(tiny).div_(part.clamp_min(tiny)).log_()


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl, shard_weight="teacher"),
    "reverse_kl": Divergence(reverse_kl, shard_weight="student", finite_without_teacher=False),
    "jsd": Divergence(jsd),
    "skew_forward_kl": Divergence(skew_forward_kl),
    "skew_reverse_kl": Divergence(skew_reverse_kl),
    "total_variation": Divergence(total_variation),
    "soft_cross_entropy": Divergence(soft_cross_entropy, shard_weight="teacher"),
}
