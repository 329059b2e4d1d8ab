"""Loss and gradient of one chunk of tokens, given this rank's shard of the logits.

    statistics   each rank on its own shard                         logits become probabilities in place
    collective   all-gather of a few numbers a token
    gradient     every rank, from the gathered statistics           probabilities become the gradient in place

Shapes: c tokens in the chunk, w real columns of the shard, tp ranks, k listed tokens of a sparse teacher. The
student's softmax within the shard is written q^ below, its mass in the shard Q, and p^, P are the teacher's.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_capgap.config.errors import UserError
from megatron_capgap.config.schema import Objective
from megatron_capgap.losses.divergences import DIVERGENCES
from megatron_capgap.losses.shard import (
    LOG_OF_NOTHING,
    VocabShard,
    blocks_in_cache,
    local_softmax_,
    log_sum_exp,
    softmax_,
)
from megatron_capgap.losses.teachers import Tail


class Comparison(Protocol):
    """Student against teacher on one chunk, in two steps with the collective between them."""

    def local_(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Student logits [c, w] become exp(logits - normaliser).

        Returns the normaliser [c] and the statistics [m, c] that `resolve` needs of all ranks.
        """

    def resolve(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """From the statistics of all ranks [tp, m, c]: the divergence [c] (the same on every rank), and the
        [c] by which the student's local probabilities enter the gradient of the divergence."""

    def add_rest_(self, gradient: Tensor, scale: Tensor) -> None:
        """gradient [c, w] += scale [c] * what else the gradient of the divergence is made of."""


class DenseComparison:
    """All logits of the teacher are known.

    Args:
        teacher: [c, w] teacher logits over the temperature; overwritten.
        objective: names the divergence.
        shard: this rank's columns.
    """

    def __init__(self, teacher: Tensor, objective: Objective, shard: VocabShard) -> None:
        self.teacher, self.objective, self.shard = teacher, objective, shard
        self.row = DIVERGENCES[objective.divergence]

    def local_(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Comparison`; the teacher's logits become the pull. Statistics: log-sum-exp of the student and of
        the teacher within the shard, sums of values and of pulls."""
        parts = []
        if self.row.shard_weight is not None:
            for q, p in blocks_in_cache(student, self.teacher):
                (log_q, lse_q), (log_p, lse_p) = local_softmax_(q), local_softmax_(p)
                parts.append(torch.stack([lse_q, lse_p, *self._pull_(q, p, log_q, log_p)]))
            statistics = torch.cat(parts, 1)
            return statistics[0], statistics
        lse = torch.stack([log_sum_exp(student), log_sum_exp(self.teacher)])
        whole = self.shard.gather(lse).logsumexp(0)
        for q, p, lse_q, lse_p in blocks_in_cache(student, self.teacher, *whole):
            log_q, log_p = q - lse_q[:, None], p - lse_p[:, None]
            torch.exp(log_q, out=q)
            torch.exp(log_p, out=p)
            parts.append(torch.stack(self._pull_(q, p, log_q, log_p)))
        return whole[0], torch.cat([lse, torch.cat(parts, 1)])

    def _pull_(self, q: Tensor, p: Tensor, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the pull in place of p [r, w]; returns the sums of values and of pulls [r]."""
        value, pull = self.row.formula(p, q, log_p, log_q, self.objective)
        p.copy_(pull)
        return value.sum(1), pull.sum(1)

    def resolve(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Comparison`."""
        rank = self.shard.rank
        value, pull = gathered[:, 2], gathered[:, 3]
        if self.row.shard_weight is None:
            self.pull_weight = torch.ones_like(value[rank])
            return value.sum(0), pull.sum(0)
        # The chain rule: divergences inside the shards, weighted by W, plus the divergence between the
        # shards' masses.
        log_q, log_p = (lse - lse.logsumexp(0) for lse in (gathered[:, 0], gathered[:, 1]))
        q, p = log_q.exp(), log_p.exp()
        outer_value, outer_pull = self.row.formula(p, q, log_p, log_q, self.objective)
        weight = p if self.row.shard_weight == "teacher" else q
        inner = (weight * value).sum(0)
        on_student = weight[rank] * pull[rank] + q[rank] * outer_pull.sum(0) - outer_pull[rank]
        if weight is q:  # the weights move with the student, too
            on_student += q[rank] * (value[rank] - inner)
        self.pull_weight = weight[rank]
        return inner + outer_value.sum(0), on_student

    def add_rest_(self, gradient: Tensor, scale: Tensor) -> None:
        """As in `Comparison`; the rest is minus the pull."""
        gradient.addcmul_(self.teacher, (scale * self.pull_weight)[:, None], value=-1)


class SparseComparison:
    """Of the teacher k tokens a position are known, with their log-probabilities.

    Both distributions are reduced to the same few outcomes, the listed tokens and perhaps one for all others,
    where the formula of the table is evaluated on every rank alike.

    Args:
        ids: [c, k] ids in the whole vocabulary.
        log_probs: [c, k].
        tail: see `TeacherTopK`.
        objective: names the divergence.
        shard: this rank's columns.
    """

    def __init__(
        self, ids: Tensor, log_probs: Tensor, tail: Tail, objective: Objective, shard: VocabShard
    ) -> None:
        self.ids, self.tail, self.objective, self.shard = ids, tail, objective, shard
        self.log_probs = log_probs.clamp_min(LOG_OF_NOTHING)
        self.row = DIVERGENCES[objective.divergence]
        if tail == "drop" and not self.row.finite_without_teacher:
            raise UserError(
                f"teacher top-k with tail 'drop': {objective.divergence} is infinite where the teacher gives "
                "nothing; use tail 'renormalise' or 'ghost'"
            )

    def local_(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Comparison`. Statistics: lse, then the student's logits at the k ids."""
        listed = self.shard.pick(student, self.ids)
        lse = softmax_(student)
        return lse, torch.cat([lse[None], listed.t()])

    def resolve(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Comparison`."""
        lse = gathered[:, 0].logsumexp(0)
        log_q = gathered[:, 1:].sum(0).t() - lse[:, None]
        log_p = self.log_probs
        if self.tail == "renormalise":
            log_q, log_p = log_q.log_softmax(1), log_p.log_softmax(1)
        else:
            nothing = torch.full_like(lse[:, None], LOG_OF_NOTHING)
            log_p = torch.cat([log_p, nothing if self.tail == "drop" else _log_remainder(log_p)], 1)
            log_q = torch.cat([log_q, _log_remainder(log_q)], 1)
        q = log_q.exp()
        value, pull = self.row.formula(log_p.exp(), q, log_p, log_q, self.objective)
        on_outcomes = q * pull.sum(1, keepdim=True) - pull
        k = self.ids.shape[1]
        # An unlisted token moves the last outcome in proportion to its share of it.
        on_others = on_outcomes[:, k] / q[:, k] if self.tail != "renormalise" else torch.zeros_like(lse)
        self.on_listed = on_outcomes[:, :k] - on_others[:, None] * q[:, :k]
        return value.sum(1), on_others * (gathered[self.shard.rank, 0] - lse).exp()

    def add_rest_(self, gradient: Tensor, scale: Tensor) -> None:
        """As in `Comparison`; the rest stands at the listed ids."""
        self.shard.add_at_(gradient, self.ids, scale[:, None] * self.on_listed)


def _log_remainder(log_probs: Tensor) -> Tensor:
    """log(1 - sum exp), [c, k] -> [c, 1]; what is left is at least the rounding error of the sum."""
    remainder = 1 - log_probs.exp().sum(1, keepdim=True)
    return remainder.clamp_min_(torch.finfo(log_probs.dtype).eps).log_()


@dataclass(frozen=True)
class ChunkLosses:
    """Per token, the same on every tensor-parallel rank; not yet masked."""

    cross_entropy: Tensor
    """[c]"""
    divergence: Tensor | None
    """[c], T^2 included; None without a teacher."""


def chunk_losses_(
    logits: Tensor,
    comparison: Comparison | None,
    labels: Tensor,
    weight: Tensor,
    objective: Objective,
    shard: VocabShard,
    *,
    spare: Tensor | None,
    with_gradient: bool,
) -> ChunkLosses:
    """Losses of one chunk; with_gradient leaves the gradient of their weighted sum in place of the logits.

    One all-gather over the tensor-parallel group, two for the divergences that have no chain rule.

    Args:
        logits: [c, w] student logits of the shard; overwritten, with_gradient by the gradient of
            sum_i weight_i * (divergence_weight * divergence_i + cross_entropy_weight * cross_entropy_i).
        comparison: the teacher's side; None for the cross-entropy alone.
        labels: [c] ids in the whole vocabulary; a label outside it needs weight 0.
        weight: [c] loss mask.
        objective: weights and temperature.
        shard: this rank's columns.
        spare: [c, w], overwritten; given where the comparison has a temperature other than 1, since the two
            losses look at two different distributions then.
        with_gradient: False where only the losses are wanted.
    """
    at_label = shard.pick(logits, labels[:, None]).t()
    tempered = logits if spare is None else torch.div(logits, objective.temperature, out=spare)
    if comparison is None:
        normaliser = softmax_(logits)
        statistics = normaliser[None]
    else:
        normaliser, statistics = comparison.local_(tempered)
    local_lse = statistics[0]
    if spare is not None:
        normaliser = local_lse = softmax_(logits)
    gathered = shard.gather(torch.cat([statistics, local_lse[None], at_label]))

    lse = gathered[:, -2].logsumexp(0)
    cross_entropy = lse - gathered[:, -1].sum(0)
    divergence, on_student = (None, None) if comparison is None else comparison.resolve(gathered[:, :-2])
    if with_gradient:
        on_cross_entropy = objective.cross_entropy_weight * weight
        factor = on_cross_entropy * (normaliser - lse).exp()
        if comparison is None:
            logits.mul_(factor[:, None])
        else:
            on_divergence = (
                objective.divergence_weight * objective.temperature * weight
            )  # T^2 of the loss, 1/T of s/T
            if spare is None:
                logits.mul_((factor + on_divergence * on_student)[:, None])
            else:
                logits.mul_(factor[:, None]).addcmul_(tempered, (on_divergence * on_student)[:, None])
            comparison.add_rest_(logits, on_divergence)
        shard.add_at_(logits, labels[:, None], -on_cross_entropy[:, None])
    return ChunkLosses(cross_entropy, None if divergence is None else objective.temperature**2 * divergence)
