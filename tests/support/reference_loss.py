"""The losses once more, dense, in float64 and on one rank: written to be read, differentiated by autograd."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses import TeacherHidden, TeacherLogits, TeacherTopK


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[n, v], [n, v] -> [n]"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, share_of_p: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log(1 - share_of_p))


def jsd(log_p: Tensor, log_q: Tensor, o: ObjectiveConfig) -> Tensor:
    log_m = mixture(log_p, log_q, o.jsd_beta)
    return o.jsd_beta * kl(log_p, log_m) + (1 - o.jsd_beta) * kl(log_q, log_m)


DENSE: dict[str, Callable[[Tensor, Tensor, ObjectiveConfig], Tensor]] = {
    "forward_kl": lambda log_p, log_q, o: kl(log_p, log_q),
    "reverse_kl": lambda log_p, log_q, o: kl(log_q, log_p),
    "jsd": jsd,
    "skew_forward_kl": lambda log_p, log_q, o: kl(log_p, mixture(log_p, log_q, o.skew_alpha)),
    "skew_reverse_kl": lambda log_p, log_q, o: kl(log_q, mixture(log_q, log_p, o.skew_alpha)),
    "total_variation": lambda log_p, log_q, o: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
    "soft_cross_entropy": lambda log_p, log_q, o: -(log_p.exp() * log_q).sum(-1),
}


@dataclass(frozen=True)
class Expected:
    """What a right loss gives, float64."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    hidden_gradient: Tensor
    """[n, h]"""
    head_gradient: Tensor
    """[padded v, h]"""


def reference_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: TeacherHidden | TeacherLogits | TeacherTopK | None,
    labels: Tensor,
    mask: Tensor,
    objective: ObjectiveConfig,
    vocab_size: int,
) -> Expected:
    """Whole tensors: hidden [n, h], head [padded v, h], the teacher's likewise, labels and mask [n]."""
    hidden = hidden.double().detach().requires_grad_()
    head = head.double().detach().requires_grad_()
    logits = hidden @ head[:vocab_size].t()
    counted = mask != 0
    true_token = labels.where(counted, 0)[:, None]
    cross_entropy = -logits.log_softmax(-1).gather(1, true_token)[:, 0]

    log_q = (logits / objective.temperature).log_softmax(-1)
    divergence = DENSE[objective.divergence]
    if teacher is None:
        per_token = torch.zeros_like(cross_entropy)
    elif isinstance(teacher, TeacherTopK):
        per_token = divergence(*listed_outcomes(teacher, log_q), objective)
    else:
        per_token = divergence(teacher_log_probs(teacher, objective.temperature, vocab_size), log_q, objective)
    per_token = per_token * objective.temperature**2

    sums = [(mask.double() * per_token).sum() for per_token in (cross_entropy, per_token)]
    loss = objective.cross_entropy_weight * sums[0] + objective.divergence_weight * sums[1]
    gradients = torch.autograd.grad(loss, (hidden, head))
    return Expected(loss.detach(), sums[0].detach(), sums[1].detach(), *gradients)


def teacher_log_probs(teacher: TeacherHidden | TeacherLogits, temperature: float, vocab_size: int) -> Tensor:
    if isinstance(teacher, TeacherHidden):
        logits = teacher.hidden.double() @ teacher.head.double().t()
    else:
        logits = teacher.logits.double()
    return (logits[:, :vocab_size] / temperature).log_softmax(-1)


def listed_outcomes(teacher: TeacherTopK, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Both distributions over what the tail makes of the vocabulary, as log-probabilities."""
    log_p, log_q_listed = teacher.log_probs.double(), log_q.gather(1, teacher.ids)
    if teacher.tail == "renormalise":
        return log_p.log_softmax(-1), log_q_listed.log_softmax(-1)
    if teacher.tail == "ghost":
        rest_p, rest_q = ((1 - x.exp().sum(-1, keepdim=True)).log() for x in (log_p, log_q_listed))
        return torch.cat([log_p, rest_p], -1), torch.cat([log_q_listed, rest_q], -1)
    dropped = torch.full_like(log_q, -1e30).scatter(1, teacher.ids, log_p)
    return dropped, log_q
