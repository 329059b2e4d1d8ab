"""One rank's shard of the vocabulary, and the collectives that combine the shards' statistics."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.common.errors import UserError

# The log of zero probability. Finite, so that 0 * log 0 is 0 and not NaN, and far below any real logit.
LOG_OF_NOTHING = -1.0e30

# Entries of a block per thread: a few temporaries of this size fit a core's cache, and the block is large enough for
# torch, which gives each thread at least 2^15 entries, to use all threads.
BLOCK_OF_A_CORE = 2**16

# Newer torch versions warn about the older names.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, start + width) of the vocabulary, on this rank of the tensor-parallel group.

    `width` counts real columns only. With a padded vocabulary the last ranks have fewer of them, possibly none.
    Padded columns are never computed, so they have probability 0 and get no gradient.
    """

    group: dist.ProcessGroup | None
    size: int
    rank: int
    start: int
    width: int

    @classmethod
    def of(cls, padded_width: int, vocab_size: int, group: dist.ProcessGroup | None) -> "VocabShard":
        """The shard of this rank.

        Args:
            padded_width: rows of the LM head on each rank, padding included (v/tp).
            vocab_size: number of real columns of the whole vocabulary.
            group: the tensor-parallel group; None for one rank.

        Raises:
            UserError: the shards together are smaller than the vocabulary.
        """
        size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        if not 0 < vocab_size <= size * padded_width:
            raise UserError(
                f"vocab_size {vocab_size} does not fit {size} LM-head shard(s) of {padded_width} rows "
                f"({size * padded_width} in total); pad the heads or pass the vocabulary size they were built for"
            )
        start = rank * padded_width
        return cls(group, size, rank, start, min(max(vocab_size - start, 0), padded_width))

    def gather(self, local: Tensor) -> Tensor:
        """[m, c] on each rank -> [tp, m, c], the same on every rank. Collective (one all-gather); none on one rank."""
        if self.size == 1:
            return local[None]
        return self.gather_rows(local).view(self.size, *local.shape)

    def gather_rows(self, local: Tensor) -> Tensor:
        """[m, c] on each rank -> [tp * m, c], in rank order. Collective (one all-gather)."""
        everyone = local.new_empty(self.size * local.shape[0], local.shape[1])
        _ALL_GATHER(everyone, local.contiguous(), group=self.group)
        return everyone

    def reduce_rows(self, partial: Tensor, out: Tensor) -> None:
        """out [m, c] = this rank's rows of partial [tp * m, c] summed over ranks. Collective (one reduce-scatter)."""
        _REDUCE_SCATTER(out, partial, group=self.group)

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """values [c, width], ids [c, k] in the whole vocabulary -> [c, k]; 0 where another rank holds the id.

        The sum over ranks is the value at the id, because exactly one rank holds it.
        """
        if self.width == 0:
            return values.new_zeros(ids.shape)
        columns, here = self._columns(ids)
        return values.gather(1, columns).masked_fill_(~here, 0)

    def add_at_(self, values: Tensor, ids: Tensor, increments: Tensor) -> None:
        """values [c, width] += increments [c, k] at ids [c, k], for the ids that this rank holds."""
        if self.width:
            columns, here = self._columns(ids)
            values.scatter_add_(1, columns, increments.masked_fill(~here, 0))

    def _columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        columns = ids - self.start
        here = (columns >= 0) & (columns < self.width)
        return columns.masked_fill_(~here, 0), here


def blocks_in_cache(matrix: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits a matrix [c, w], and others of c rows, into views small enough for temporaries to stay in the CPU caches.

    On a GPU the block is the whole matrix: it has no such cache, and each kernel launch costs time.
    """
    block = BLOCK_OF_A_CORE * torch.get_num_threads()
    rows = max(1, block // max(1, matrix.shape[1])) if matrix.is_cpu else matrix.shape[0]
    return zip(*(tensor.split(rows) for tensor in (matrix, *others)), strict=True)


def local_softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces logits [r, w] by probabilities within the shard, in place.

    Returns the log-probabilities [r, w] and the log-sum-exp [r] of the original logits.
    """
    if logits.shape[1] == 0:
        return logits, logits.new_full(logits.shape[:1], LOG_OF_NOTHING)
    top = logits.amax(1, keepdim=True)
    log_probs = logits - top
    total = torch.exp(log_probs, out=logits).sum(1, keepdim=True)
    log_total = total.log()
    logits.mul_(total.reciprocal_())
    return log_probs.sub_(log_total), top.add_(log_total).squeeze_(1)


def softmax_(logits: Tensor) -> Tensor:
    """Replaces logits [c, w] by probabilities within the shard, in place; returns the logits' log-sum-exp [c]."""
    return torch.cat([local_softmax_(block)[1] for (block,) in blocks_in_cache(logits)])


def log_sum_exp(logits: Tensor) -> Tensor:
    """Log-sum-exp over the shard's columns: [c, w] -> [c]."""
    lse = torch.cat([block.logsumexp(1) for (block,) in blocks_in_cache(logits)])
    return lse.clamp_min_(LOG_OF_NOTHING)
