"""Losses and gradient of one chunk of tokens, given this rank's shard of its logits.

local, on each rank's shard      replace logits by probabilities, in place
all-gather of a few numbers      per token: log-sum-exp, sums, the logit at the label
local, on each rank's shard      replace probabilities by the gradient, in place
"""

import torch
from torch import Tensor

from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.comparison import Comparison
from megatron_capgap.losses.vocab_shard import VocabShard, softmax_


def chunk_losses_(
    logits: Tensor,
    comparison: Comparison,
    labels: Tensor,
    weight: Tensor,
    objective: ObjectiveConfig,
    shard: VocabShard,
    *,
    spare: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Unweighted cross-entropy and divergence (T^2 included) of each token, [c] and [c], the same on every rank.

    Collective: one all-gather over the tensor-parallel group; one more for a divergence without a chain rule.

    Args:
        logits: [c, w] student logits of the shard; overwritten, if with_gradient by the gradient of
            sum_i weight_i * (divergence_weight * divergence_i + cross_entropy_weight * cross_entropy_i).
        comparison: the comparison with the teacher.
        labels: [c] ids in the whole vocabulary; a label outside it needs weight 0.
        weight: [c] loss mask.
        objective: weights and temperature.
        shard: this rank's columns.
        spare: [c, w], overwritten. Required if the comparison's temperature is not 1: the two losses then use
            different distributions. Otherwise None.
        with_gradient: False to compute the losses only.
    """
    temperature = objective.temperature
    at_label = shard.pick(logits, labels[:, None]).t()
    normaliser, statistics = comparison.local_(logits if spare is None else torch.div(logits, temperature, out=spare))
    local_lse = statistics[0]
    if spare is not None:
        normaliser = local_lse = softmax_(logits)
    gathered = shard.gather(torch.cat([statistics, local_lse[None], at_label]))

    lse = gathered[:, -2].logsumexp(0)
    cross_entropy = lse - gathered[:, -1].sum(0)
    divergence, factor = comparison.resolve(gathered[:, :-2])
    if with_gradient:
        for_cross_entropy = weight * objective.cross_entropy_weight
        for_divergence = weight * objective.divergence_weight * temperature  # T^2 of the loss times 1/T of d(s / T)
        on_softmax, on_tempered = for_cross_entropy * (normaliser - lse).exp(), for_divergence * factor
        if spare is None:
            comparison.gradient_(logits, on_softmax + on_tempered, for_divergence)
        else:
            comparison.gradient_(spare, on_tempered, for_divergence)
            torch.addcmul(spare, logits, on_softmax[:, None], out=logits)
        shard.add_at_(logits, labels[:, None], -for_cross_entropy[:, None])
    return cross_entropy, temperature**2 * divergence
