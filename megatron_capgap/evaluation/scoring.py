"""Log-likelihoods of continuations, in batches, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.data.batch import MicroBatch, collate
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.losses import token_scores
from megatron_capgap.models import pipeline_schedule
from megatron_capgap.models.gpt import unwrap

BUCKET = 64
"""Rows are padded to a multiple of this, so that rows of similar length share a pipeline batch."""


@dataclass(frozen=True)
class ScoringRow:
    """A text whose last tokens are scored."""

    tokens: tuple[int, ...]
    """All tokens; the model's input is all but the last."""
    scored: int
    """Number of last tokens that are scored; less than the length, because the first token has no context."""


class Score(NamedTuple):
    """Log-probability of a row's scored tokens."""

    log_likelihood: float
    """Sum of their log-probabilities, in nats."""
    greedy: bool
    """Whether each of them is the most probable token given the previous ones."""


@dataclass(frozen=True)
class Scorer:
    """A model that scores rows.

    Args:
        chunks: this rank's model chunks, in evaluation mode.
        parallel: their layout, without virtual stages.
        vocab_size: number of real columns of the LM head; the rest is padding.
        micro_batch: rows in one forward pass of one rank.
        longest: maximum number of tokens of the model; under sequence parallelism a multiple of the tensor-parallel
            size.
        device: device of the tensors.
    """

    chunks: Sequence[torch.nn.Module]
    parallel: ParallelContext
    vocab_size: int
    micro_batch: int
    longest: int
    device: torch.device

    def __call__(self, rows: Sequence[ScoringRow]) -> list[Score]:
        """Scores rows, in their order; the same on every rank. Collective: all ranks pass the same rows."""
        assert all(row.scored < len(row.tokens) <= self.longest + 1 for row in rows)
        mine: dict[int, Score] = {}
        with torch.no_grad():
            for length, batches in groupby(self._batches(rows), key=lambda batch: batch.tokens.shape[1]):
                self._run(list(batches), length, mine)
        found: list[dict[int, Score]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine if self.parallel.tp_rank == 0 else {})
        scores = {number: score for part in found for number, score in part.items()}
        return [scores[number] for number in range(len(rows))]

    def _batches(self, rows: Sequence[ScoringRow]) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches, longest first, so that a lack of memory shows at once."""
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
        batches = []
        for length, group in groupby(order, key=lambda number: self._padded(len(rows[number].tokens) - 1)):
            numbers = list(group)
            for first in range(0, len(numbers), self.micro_batch):
                batches.append(self._collate(rows, numbers[first : first + self.micro_batch], length))
        return batches[self.parallel.dp_rank :: self.parallel.dp_size]

    def _padded(self, length: int) -> int:
        return min(-(-max(length, 1) // BUCKET) * BUCKET, self.longest)

    def _collate(self, rows: Sequence[ScoringRow], numbers: list[int], length: int) -> MicroBatch:
        """A micro-batch of rows [micro_batch, length], right-padded; causal attention does not attend to padding."""
        padded = np.zeros((self.micro_batch, length + 1), dtype=np.int64)
        mask = torch.zeros(self.micro_batch, length)
        for place, number in enumerate(numbers):
            tokens, scored = rows[number].tokens, rows[number].scored
            padded[place, : len(tokens)] = tokens
            mask[place, len(tokens) - 1 - scored : len(tokens) - 1] = 1
        batch = collate(list(padded), numbers, length, self.device)
        batch.loss_mask = mask.to(self.device)
        return batch

    def _run(self, batches: list[MicroBatch], length: int, into: dict[int, Score]) -> None:
        """Adds the scores of the micro-batches' rows to `into`; last stage only, identical on tensor-parallel ranks."""

        def last_stage(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, None]:
            labels, mask = batch.flat()
            log_probs, greedy = token_scores(
                hidden.flatten(0, 1),
                unwrap(self.chunks[-1]).lm_head(),
                labels,
                vocab_size=self.vocab_size,
                group=self.parallel.groups.tp,
                sequence_parallel=self.parallel.layout.sequence,
            )
            sums = (log_probs.double() * mask).view(length, -1).sum(0).tolist()
            same = (greedy | (mask == 0)).view(length, -1).all(0).tolist()
            into.update(zip(batch.sample_ids, map(Score, sums, same), strict=False))  # padding rows have no number
            return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=hidden.device), None

        pipeline_schedule.run(
            self.chunks, self.parallel, batches, last_stage, forward_only=True, shape=(length, self.micro_batch)
        )
