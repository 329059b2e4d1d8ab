"""Compares student and teacher on one chunk of tokens: the local computation before and after the collective.

Shapes: c tokens in the chunk, r of them in a block that fits the CPU caches, w real columns of the shard, tp ranks,
k listed tokens of a sparse teacher, m statistics per token. `logit_grad_term` is that of `divergences.py`.
"""

from typing import Protocol

import torch
from torch import Tensor

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.divergences import DIVERGENCES
from megatron_capgap.losses.teacher_outputs import Tail
from megatron_capgap.losses.vocab_shard import (
    LOG_OF_NOTHING,
    VocabShard,
    blocks_in_cache,
    local_softmax_,
    log_sum_exp,
    softmax_,
)


class Comparison(Protocol):
    """The gradient of the divergence with respect to the student's logits is `factor * probabilities + rest`."""

    def local_(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Replaces the student's logits [c, w] by the probabilities exp(logits - normaliser), in place.

        Returns the normaliser [c], and the statistics [m, c] that `resolve` needs from all ranks; their first row is
        the student's log-sum-exp within the shard.
        """

    def resolve(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' statistics [tp, m, c] -> the divergence [c], the same on every rank, and the local factor [c]."""

    def gradient_(self, probabilities: Tensor, factor: Tensor, scale: Tensor) -> None:
        """Replaces probabilities [c, w] by factor [c] * probabilities + scale [c] * rest, in place."""


class NoComparison:
    """No teacher: the divergence is 0."""

    def local_(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics: log-sum-exp of the student within the shard."""
        lse = softmax_(student)
        return lse, lse[None]

    def resolve(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence 0 and factor 0."""
        zero = torch.zeros_like(gathered[0, 0])
        return zero, zero

    def gradient_(self, probabilities: Tensor, factor: Tensor, scale: Tensor) -> None:
        """As in `Comparison`, with rest = 0."""
        probabilities.mul_(factor[:, None])


class DenseComparison:
    """Comparison with a teacher whose logits are all known.

    The rest of the gradient is the weighted logit gradient term of `divergences.py`.

    Args:
        teacher: [c, w] teacher logits divided by the temperature; overwritten by the logit gradient term.
        objective: names the divergence.
        shard: this rank's columns.
    """

    def __init__(self, teacher: Tensor, objective: ObjectiveConfig, shard: VocabShard) -> None:
        self.teacher, self.objective, self.shard = teacher, objective, shard
        self.row = DIVERGENCES[objective.divergence]

    def local_(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics: log-sum-exp of student and teacher within the shard, sums of values and of gradient terms."""
        parts: list[tuple[Tensor, ...]] = []
        if self.row.shard_weight is not None:
            for q, p in blocks_in_cache(student, self.teacher):
                (log_q, lse_q), (log_p, lse_p) = local_softmax_(q), local_softmax_(p)
                parts.append((lse_q, lse_p, *self._logit_grad_term_(q, p, log_q, log_p)))
            statistics = _in_rows(parts)
            return statistics[0], statistics
        # No chain rule: the formula needs probabilities over the whole vocabulary, so normalisers are gathered first.
        lse = torch.stack([log_sum_exp(student), log_sum_exp(self.teacher)])
        normalisers = self.shard.gather(lse).logsumexp(0)
        for q, p, of_q, of_p in blocks_in_cache(student, self.teacher, *normalisers):
            log_q, log_p = q - of_q[:, None], p - of_p[:, None]
            torch.exp(log_q, out=q)
            torch.exp(log_p, out=p)
            parts.append(self._logit_grad_term_(q, p, log_q, log_p))
        return normalisers[0], torch.cat([lse, _in_rows(parts)])

    def _logit_grad_term_(self, q: Tensor, p: Tensor, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrites p [r, w] by the logit gradient term; returns the sums of values and of gradient terms [r]."""
        value, logit_grad_term = self.row.formula(p, q, log_p, log_q, self.objective)
        p.copy_(logit_grad_term)
        return value.sum(1), logit_grad_term.sum(1)

    def resolve(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Comparison`; by the chain rule if the divergence has one."""
        mine = self.shard.rank
        value, logit_grad_term = gathered[:, 2], gathered[:, 3]
        if self.row.shard_weight is None:
            self.weight = torch.ones_like(value[mine])
            return value.sum(0), logit_grad_term.sum(0)
        # Probability masses P and Q of the shards, [tp, c], and the divergence between them, by the same formula.
        log_q, log_p = (gathered[:, i] - gathered[:, i].logsumexp(0) for i in (0, 1))
        q, p = log_q.exp(), log_p.exp()
        outer_value, outer_grad_term = self.row.formula(p, q, log_p, log_q, self.objective)
        weight = p if self.row.shard_weight == "teacher" else q
        inner = (weight * value).sum(0)
        # A logit changes the softmax within its shard and the shard's mass, hence also the weights if they are Q.
        factor = weight[mine] * logit_grad_term[mine] + q[mine] * outer_grad_term.sum(0) - outer_grad_term[mine]
        if self.row.shard_weight == "student":
            factor += q[mine] * (value[mine] - inner)
        self.weight = weight[mine]
        return inner + outer_value.sum(0), factor

    def gradient_(self, probabilities: Tensor, factor: Tensor, scale: Tensor) -> None:
        """As in `Comparison`."""
        for q, logit_grad_term, of_q, of_grad_term in blocks_in_cache(
            probabilities, self.teacher, factor, -scale * self.weight
        ):
            q.mul_(of_q[:, None]).addcmul_(logit_grad_term, of_grad_term[:, None])


class SparseComparison:
    """Comparison with a teacher of which k log-probabilities per position are known.

    Both distributions are reduced to the same outcomes: the listed tokens, and unless `tail` is renormalise one more
    for all other tokens. Every rank evaluates the formula on these. The rest of the gradient is non-zero at the listed
    tokens only.

    Args:
        ids: [c, k] int64 ids in the whole vocabulary; ignored where the log-probability is -inf.
        log_probs: [c, k].
        tail: see `TeacherTopK`.
        objective: names the divergence.
        shard: this rank's columns.

    Raises:
        UserError: the tail is dropped, and the divergence is infinite where the teacher's probability is 0.
    """

    def __init__(self, ids: Tensor, log_probs: Tensor, tail: Tail, objective: ObjectiveConfig, shard: VocabShard):
        self.ids, self.log_probs, self.tail = ids, log_probs, tail
        self.objective, self.shard, self.row = objective, shard, DIVERGENCES[objective.divergence]
        if tail == "drop" and not self.row.finite_without_teacher:
            raise UserError(
                f"teacher top-k with tail 'drop': {objective.divergence} is infinite where the teacher has "
                "probability 0; use tail 'renormalise' or 'ghost'"
            )

    def local_(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics: log-sum-exp of the student within the shard, its logits at the k ids."""
        listed = self.shard.pick(student, self.ids)
        lse = softmax_(student)
        return lse, torch.cat([lse[None], listed.t()])

    def resolve(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Comparison`."""
        lse = gathered[:, 0].logsumexp(0)
        absent = self.log_probs.isneginf()
        log_p = self.log_probs.masked_fill(absent, LOG_OF_NOTHING)
        log_q = (gathered[:, 1:].sum(0).t() - lse[:, None]).masked_fill(absent, LOG_OF_NOTHING)
        if self.tail == "renormalise":
            log_p, log_q = log_p.log_softmax(1), log_q.log_softmax(1)
        else:
            nothing = torch.full_like(lse[:, None], LOG_OF_NOTHING)
            log_p = torch.cat([log_p, nothing if self.tail == "drop" else _log_remainder(log_p)], 1)
            log_q = torch.cat([log_q, _log_remainder(log_q)], 1)
        q = log_q.exp()
        value, logit_grad_term = self.row.formula(log_p.exp(), q, log_p, log_q, self.objective)
        on_outcomes = q * logit_grad_term.sum(1, keepdim=True) - logit_grad_term
        if self.tail == "renormalise":
            per_mass = torch.zeros_like(lse)
        else:  # an unlisted token's logit changes the last outcome in proportion to its share of that mass
            per_mass = on_outcomes[:, -1] / q[:, -1]
            on_outcomes, q = on_outcomes[:, :-1], q[:, :-1]
        self.at_listed, self.per_mass = on_outcomes - per_mass[:, None] * q, per_mass
        return value.sum(1), per_mass * (gathered[self.shard.rank, 0] - lse).exp()

    def gradient_(self, probabilities: Tensor, factor: Tensor, scale: Tensor) -> None:
        """As in `Comparison`."""
        probabilities.mul_(factor[:, None])
        self.shard.add_at_(probabilities, self.ids, scale[:, None] * self.at_listed)


def _in_rows(parts: list[tuple[Tensor, ...]]) -> Tensor:
    """Concatenates m numbers per token: blocks of m tensors [r] -> [m, c]."""
    return torch.stack([torch.cat(row) for row in zip(*parts, strict=True)])


def _log_remainder(log_probs: Tensor) -> Tensor:
    """log(1 - sum exp), [c, k] -> [c, 1]; at least log(eps), the rounding error of the sum."""
    remainder = 1 - log_probs.exp().sum(1, keepdim=True)
    return remainder.clamp_min_(torch.finfo(log_probs.dtype).eps).log_()
