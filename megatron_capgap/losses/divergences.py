"""Table of divergences between the teacher's distribution p and the student's q: one formula and one row each.

A formula takes p, q and their logarithms at some entries of the vocabulary (any shape, the same for all four) and
returns, per entry and without modifying its arguments,

    value            the entry's contribution to D(p, q) = sum_v value_v
    logit_grad_term  t_v = -q_v * d value_v / d q_v. With q = softmax(s) it gives the gradient
                     d D / d s_v = q_v * sum_w t_w - t_v

Adding any multiple of q to the term does not change that gradient. Each formula uses this so that its term is exactly
0 where p equals q: a student that equals its teacher gets a gradient of 0, not rounding errors.

Under tensor parallelism rank r holds a shard of the vocabulary, in which p has the mass P_r and the conditional
distribution p/P_r (for the student Q_r and q/Q_r). The Kullback-Leibler family obeys the chain rule

    D(p, q) = sum_r W_r * D(p/P_r, q/Q_r) + D(P, Q)            W = P or W = Q

so each rank uses its local normaliser, and one collective of a few numbers per token completes the sum. All other
divergences need the global normaliser first: two dependent collectives, each of which carries two chunks. (Sending the
second one with the first one of the next chunk would keep as many logits alive and need as many messages.) The column
`shard_weight` is W, or None without a chain rule.
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
    """(p, q, log p, log q, objective) -> (value, logit gradient term); see the module docstring."""
    shard_weight: Literal["teacher", "student"] | None = None
    """W of the chain rule: teacher is P, student is Q. None without a chain rule; the schema then lists the row in
    WITHOUT_CHAIN_RULE."""
    finite_without_teacher: bool = True
    """Whether D is finite where p is 0 and q is not (tokens outside a sparse teacher's list, with tail drop)."""


def forward_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q), Hinton et al. (2015); mode-covering."""
    return (log_p - log_q).mul_(p), p - q


def reverse_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q (log q - log p), MiniLLM (Gu et al., 2023); mode-seeking."""
    logit_grad_term = (log_p - log_q).mul_(q)
    return -logit_grad_term, logit_grad_term


def soft_cross_entropy(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """H(p, q) = - sum p log q, MiniMA's loss: forward_kl plus the teacher's entropy, hence the same gradient."""
    return (p * log_q).neg_(), p - q


def jsd(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, b = jsd_beta.

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2023); symmetric at b = 0.5.
    """
    b = objective.jsd_beta
    mixture = torch.lerp(q, p, b)
    logit_grad_term = _log_ratio(mixture, q).mul_(q).mul_(1 - b)
    return _log_ratio(mixture, p).mul_(p).mul_(-b).sub_(logit_grad_term), logit_grad_term


def skew_forward_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = a p + (1 - a) q, a = skew_alpha, DistiLLM (Ko et al., 2024); at most -log a."""
    a = objective.skew_alpha
    mixture = torch.lerp(q, p, a)
    logit_grad_term = _over(p - q, mixture).mul_(q).mul_((1 - a) ** 2)
    return _log_ratio(mixture, p).mul_(p).neg_(), logit_grad_term


def skew_reverse_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """KL(q || m) with m = (1 - a) p + a q, a = skew_alpha, DistiLLM (Ko et al., 2024); at most -log a."""
    a = objective.skew_alpha
    mixture = torch.lerp(p, q, a)
    towards = _log_ratio(mixture, q).mul_(q)
    return -towards, _over(p - q, mixture).mul_(q).mul_(-a * (1 - a)).add_(towards)


def total_variation(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """1/2 sum |p - q|: the largest difference between the probabilities that p and q assign to the same event."""
    difference = p - q
    return difference.abs().mul_(0.5), difference.sign().mul_(q).mul_(0.5)


def _over(numerator: Tensor, mixture: Tensor) -> Tensor:
    """numerator / mixture; 0 where both distributions underflow to 0."""
    return numerator.div_(mixture.clamp_min(torch.finfo(mixture.dtype).tiny))


def _log_ratio(mixture: Tensor, part: Tensor) -> Tensor:
    """log(mixture / part); exactly 0 where they are equal, finite where either underflows to 0."""
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
