"""One rank's share of the vocabulary, and the collective that completes its statistics."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.common.errors import UserError

# The log of "no mass at all". Finite, so that 0 * log 0 is 0 and not NaN, and far below any real logit.
LOG_OF_NOTHING = -1.0e30

# Entries of a block for each thread: a few such temporaries fit a core's cache, and torch, which hands no thread fewer
# than 2^15, uses all threads.
BLOCK_OF_A_CORE = 2**16

# Newer torch warns at the older names.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, start + width) of the vocabulary, on this rank of the tensor-parallel group.

    `width` counts real columns only. A padded vocabulary gives the last ranks fewer of them, perhaps none;
    the padded columns are never computed, which is how they weigh nothing and get no gradient.
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
                f"({size * padded_width} in all); pad the heads or give the vocabulary they were built for"
            )
        start = rank * padded_width
        return cls(group, size, rank, start, min(max(vocab_size - start, 0), padded_width))

    def gather(self, local: Tensor) -> Tensor:
        """[m, c] on each rank -> [tp, m, c], the same on every rank. One collective; none on one rank."""
        if self.size == 1:
            return local[None]
        return self.gather_rows(local).view(self.size, *local.shape)

    def gather_rows(self, local: Tensor) -> Tensor:
        """[m, c] on each rank -> [tp * m, c], in the order of the ranks. One collective."""
        everyone = local.new_empty(self.size * local.shape[0], local.shape[1])
        _ALL_GATHER(everyone, local.contiguous(), group=self.group)
        return everyone

    def reduce_rows(self, partial: Tensor, out: Tensor) -> None:
        """out [m, c] = this rank's rows of the sum over ranks of partial [tp * m, c]. One collective."""
        _REDUCE_SCATTER(out, partial, group=self.group)

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """values [c, width], ids [c, k] in the whole vocabulary -> [c, k]; 0 where another rank has the id.

        Summed over the ranks this is the value at the id, since exactly one rank has it.
        """
        if self.width == 0:
            return values.new_zeros(ids.shape)
        columns, here = self._columns(ids)
        return values.gather(1, columns).masked_fill_(~here, 0)

    def add_at_(self, values: Tensor, ids: Tensor, increments: Tensor) -> None:
        """values [c, width] += increments [c, k] at ids [c, k], as far as the ids live on this rank."""
        if self.width:
            columns, here = self._columns(ids)
            values.scatter_add_(1, columns, increments.masked_fill(~here, 0))

    def _columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        columns = ids - self.start
        here = (columns >= 0) & (columns < self.width)
        return columns.masked_fill_(~here, 0), here


def blocks_in_cache(matrix: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts a matrix [c, w], and others of c rows, into views of so few rows that temporaries stay in the cores' caches.

    A GPU has no such cache and pays for every launch, so there the block is the whole.
    """
    block = BLOCK_OF_A_CORE * torch.get_num_threads()
    rows = matrix.shape[0] if matrix.is_cuda else max(1, block // max(1, matrix.shape[1]))
    return zip(*(tensor.split(rows) for tensor in (matrix, *others)), strict=True)


def local_softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turns logits [r, w] into probabilities within the shard, in place.

    Returns their logarithms [r, w] and the log-sum-exp [r] of what the logits were.
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
    """Turns logits [c, w] into probabilities within the shard, in place; returns their log-sum-exp [c]."""
    return torch.cat([local_softmax_(block)[1] for (block,) in blocks_in_cache(logits)])


def log_sum_exp(logits: Tensor) -> Tensor:
    """[c, w] -> [c], over the shard."""
    lse = torch.cat([block.logsumexp(1) for (block,) in blocks_in_cache(logits)])
    return lse.clamp_min_(LOG_OF_NOTHING)
