"""The three passes over a chunk of logits in plain torch: on a CPU, and as the reference of the Triton kernels."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.comparison import Comparison
from megatron_capgap.losses.vocab_shard import VocabShard, softmax_


class Passes(Protocol):
    """One chunk of c tokens on one rank, in the order of the methods; one all-gather lies between the first two."""

    def statistics(self) -> Tensor:
        """[m, c], of this shard. Collective (one all-gather) for some divergences without a chain rule."""

    def resolve(self, gathered: Tensor) -> Tensor:
        """All ranks' statistics [tp, m, c] -> cross-entropy and divergence (T^2 included) [2, c], the same on every
        rank. Collective (one all-gather) for some divergences without a chain rule."""

    def gradient_(self, weight: Tensor) -> None:
        """Replaces the student's logits [c, w] by the gradient of
        sum_i weight_i * (divergence_weight * divergence_i + cross_entropy_weight * cross_entropy_i)."""


class EagerPasses:
    """As `Passes`: replaces logits by probabilities, and these by the gradient, block by block of the CPU caches.

    Args:
        logits: [c, w] student logits of the shard, fp32 or float64; overwritten.
        comparison: the comparison with the teacher.
        labels: [c] ids in the whole vocabulary; a label outside it needs weight 0.
        objective: weights and temperature.
        shard: this rank's columns.
        spare: [c, w], overwritten. Required if the comparison's temperature is not 1: the two losses then use
            different distributions. Otherwise None.
    """

    def __init__(
        self,
        logits: Tensor,
        comparison: Comparison,
        labels: Tensor,
        objective: ObjectiveConfig,
        shard: VocabShard,
        spare: Tensor | None,
    ) -> None:
        self.logits, self.comparison, self.labels = logits, comparison, labels
        self.objective, self.shard, self.spare = objective, shard, spare

    def statistics(self) -> Tensor:
        """[m, c]: what the comparison needs, the student's log-sum-exp within the shard, the logit at the label."""
        logits, spare = self.logits, self.spare
        at_label = self.shard.pick(logits, self.labels[:, None]).t()
        self.normaliser, statistics = self.comparison.local_(
            logits if spare is None else torch.div(logits, self.objective.temperature, out=spare)
        )
        local_lse = statistics[0]
        if spare is not None:
            self.normaliser = local_lse = softmax_(logits)
        return torch.cat([statistics, local_lse[None], at_label])

    def resolve(self, gathered: Tensor) -> Tensor:
        """As in `Passes`. No collective."""
        self.lse = gathered[:, -2].logsumexp(0)
        cross_entropy = self.lse - gathered[:, -1].sum(0)
        divergence, self.factor = self.comparison.resolve(gathered[:, :-2])
        return torch.stack([cross_entropy, self.objective.temperature**2 * divergence])

    def gradient_(self, weight: Tensor) -> None:
        """As in `Passes`."""
        objective, logits, spare = self.objective, self.logits, self.spare
        for_cross_entropy = weight * objective.cross_entropy_weight
        # T^2 of the loss times 1/T of d(s / T)
        for_divergence = weight * objective.divergence_weight * objective.temperature
        on_softmax = for_cross_entropy * (self.normaliser - self.lse).exp()
        on_tempered = for_divergence * self.factor
        if spare is None:
            self.comparison.gradient_(logits, on_softmax + on_tempered, for_divergence)
        else:
            self.comparison.gradient_(spare, on_tempered, for_divergence)
            torch.addcmul(spare, logits, on_softmax[:, None], out=logits)
        self.shard.add_at_(logits, self.labels[:, None], -for_cross_entropy[:, None])
