"""Log-probabilities of given tokens, and whether each is the model's greedy choice."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.config import derived
from megatron_capgap.losses.vocab_shard import LOG_OF_NOTHING, VocabShard, log_sum_exp


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-probability of each label, and whether it is the most probable token of the whole vocabulary.

    Computes logits for one chunk of tokens at a time, each rank for its own columns. No gradient.

    Collective over `group`: per chunk one all-gather of four numbers per token; with sequence parallelism one more, of
    the chunk's hidden states.

    Args:
        hidden: [n, h] replicated, or with sequence_parallel [n/tp, h], as in `language_model_loss`.
        head: [v/tp, h] local shard of the LM head, padding included.
        labels: [n] int64 ids of the vocabulary.
        vocab_size: number of real columns of the vocabulary; padding is never the most probable.
        group: the tensor-parallel group; None for one rank.
        sequence_parallel: whether hidden states are sharded along the sequence.
        chunk_tokens: tokens whose logits exist at the same time; None selects `config.derived.loss_chunk_tokens`.

    Returns:
        log_probs [n] fp32 (float64 for float64 inputs) and greedy [n] bool, the same on every tensor-parallel rank.
        Among equal logits the lowest id counts as the most probable.
    """
    shard = VocabShard.of(head.shape[0], vocab_size, group)
    parts = shard.size if sequence_parallel else 1
    chunk_tokens = derived.loss_chunk_tokens(labels.is_cpu) if chunk_tokens is None else chunk_tokens
    exact = torch.promote_types(hidden.dtype, torch.float32)
    step = max(1, min(chunk_tokens // parts, hidden.shape[0]))
    log_probs, greedy = labels.new_empty(labels.shape, dtype=exact), labels.new_empty(labels.shape, dtype=torch.bool)
    by_part = [x.unflatten(0, (parts, -1)) for x in (labels, log_probs, greedy)]
    for first in range(0, hidden.shape[0], step):
        part = hidden[first : first + step]
        rows = slice(first, first + part.shape[0])
        label_rows, to_log_probs, to_greedy = (x[:, rows] for x in by_part)
        chunk = part if parts == 1 else shard.gather_rows(part)
        logits = torch.mm(chunk, head[: shard.width].t()).to(exact)
        lse, at_label, top, top_id = shard.gather(_statistics(logits, label_rows.flatten(), shard)).unbind(1)
        to_log_probs.copy_((at_label.sum(0) - lse.logsumexp(0)).view_as(label_rows))
        likeliest = top_id.masked_fill(top < top.amax(0), torch.inf).amin(0)
        to_greedy.copy_((likeliest == label_rows.flatten()).view_as(label_rows))
    return log_probs, greedy


def _statistics(logits: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """[4, c] of the shard's logits [c, w]: log-sum-exp, the logit at the label, the largest logit and its id.

    Ids below 2^24 are exact in fp32; no vocabulary is that large.
    """
    at_label = shard.pick(logits, labels[:, None]).squeeze(1)
    if shard.width == 0:
        nothing = torch.full_like(at_label, LOG_OF_NOTHING)
        return torch.stack([nothing, at_label, nothing, torch.zeros_like(at_label)])
    top, column = logits.max(1)
    return torch.stack([log_sum_exp(logits), at_label, top, (column + shard.start).to(top.dtype)])
