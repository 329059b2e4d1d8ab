"""Micro-batches of one data-parallel rank, built from numbered samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from megatron_capgap.config import derived
from megatron_capgap.data.sampler import dp_shard


@dataclass
class MicroBatch:
    """Input of one forward pass; replicated over the tensor- and pipeline-parallel ranks.

    Under context parallelism a rank reads whole rows, and the forward pass gets the rank's `context_shard` of them.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the next token of each position.
        loss_mask: float32 [b, s], 1 where the loss counts the label.
        position_ids: int64 [b, s].
        sample_ids: sample number of each row.
        segment_ids: int64 [b, s], index within the row of the conversation that a token belongs to, -1 after the
            last one; None where a token attends to all earlier tokens of the row. Whole rows in a context shard, too.
        columns: int64 [s/cp], places in the row of the tokens in a context shard; None in a whole row.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: list[int]
    segment_ids: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def context_shard(self, rank: int, size: int) -> MicroBatch:
        """The tokens [b, s/size] of one context-parallel rank, in the order of `derived.context_chunks`; whole rows if
        `size` is 1."""
        if size == 1:
            return self
        columns = context_columns(self.tokens.shape[1], rank, size, self.tokens.device)
        return replace(
            self,
            tokens=self.tokens[:, columns],
            labels=self.labels[:, columns],
            loss_mask=self.loss_mask[:, columns],
            position_ids=self.position_ids[:, columns],
            columns=columns,
        )

    def on_device(self, upload: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """A copy of whole rows on the device; `upload` copies one tensor there."""
        assert self.columns is None, "rows are cut on the device"
        return MicroBatch(
            tokens=upload(self.tokens),
            labels=upload(self.labels),
            loss_mask=upload(self.loss_mask),
            position_ids=upload(self.position_ids),
            sample_ids=self.sample_ids,
            segment_ids=None if self.segment_ids is None else upload(self.segment_ids),
        )

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """Bool [b, 1, s/cp, s], True where attention is masked; None means plain causal attention.

        Built on access: the masks of a complete global batch would take s bytes per token.
        """
        if self.segment_ids is None:
            return None
        places = torch.arange(self.segment_ids.shape[1], device=self.tokens.device)
        ahead = places > (places if self.columns is None else self.columns)[:, None]
        return (ahead | ~self._together())[:, None]

    def lengths(self) -> torch.Tensor:
        """Int64 [b, s/cp]: length of the conversation that each token belongs to."""
        return self._together().sum(-1)

    def _together(self) -> torch.Tensor:
        """Bool [b, s/cp, s], whether two tokens belong to the same conversation."""
        assert self.segment_ids is not None, "called only for rows packed with conversations"
        mine = self.segment_ids if self.columns is None else self.segment_ids[:, self.columns]
        return mine[:, :, None] == self.segment_ids[:, None, :]

    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and loss mask as vectors [s * b], in the order of hidden states [s, b, h] reshaped to [s * b, h]."""
        return self.labels.t().reshape(-1), self.loss_mask.t().reshape(-1)


def context_columns(length: int, rank: int, size: int, device: torch.device) -> torch.Tensor:
    """Int64 [length / size]: the places of a context-parallel rank's tokens in a row of `length` tokens."""
    chunks = torch.arange(length, device=device).chunk(2 * size)
    return torch.cat([chunks[chunk] for chunk in derived.context_chunks(rank, size)])


class TokenDataset(Protocol):
    """Numbered samples of text or conversations.

    Attributes:
        sequence_length: tokens in a row.
    """

    sequence_length: int

    def __len__(self) -> int:
        """Samples in one pass."""

    def micro_batch(self, indices: Sequence[int | None], ids: list[int], device: torch.device) -> MicroBatch:
        """Returns samples as the rows of a micro-batch.

        Args:
            indices: sample numbers; None gives a row with loss mask 0.
            ids: sample numbers stored in the micro-batch.
            device: device of the tensors.
        """


def global_batch_samples(step: int, global_batch: int) -> range:
    """Sample numbers of a step; steps count from 0."""
    return range(step * global_batch, (step + 1) * global_batch)


def micro_batches(
    dataset: TokenDataset,
    samples: range,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    device: torch.device,
    limit: int | None = None,
) -> Iterator[MicroBatch]:
    """Yields the micro-batches of one data-parallel rank, assigned by `sampler.dp_shard`.

    Args:
        dataset: the dataset.
        samples: sample numbers of the global batch.
        micro_batch: rows of a micro-batch.
        data_rank, data_size: this data-parallel rank and the number of ranks.
        device: device of the tensors.
        limit: number of existing samples; rows of later samples are padding with loss mask 0. Set to the length of
            a held-out set, every layout counts each of its samples once.
    """
    for ids in dp_shard(samples, micro_batch, data_rank, data_size):
        yield read_micro_batch(dataset, ids, device, limit)


def read_micro_batch(
    dataset: TokenDataset, ids: list[int], device: torch.device, limit: int | None = None
) -> MicroBatch:
    """Reads one micro-batch of the samples `ids`; `limit` as in `micro_batches`."""
    return dataset.micro_batch([k if limit is None or k < limit else None for k in ids], ids, device)


def collate(
    rows: Sequence[np.ndarray | None], sample_ids: list[int], sequence_length: int, device: torch.device
) -> MicroBatch:
    """Stacks rows of int64 [sequence_length + 1] tokens; None gives a padding row with loss mask 0."""
    stack = np.zeros((len(rows), sequence_length + 1), dtype=np.int64)
    loss_mask = np.zeros((len(rows), sequence_length), dtype=np.float32)
    for index, row in enumerate(rows):
        if row is not None:
            stack[index] = row
            loss_mask[index] = 1
    tokens = torch.from_numpy(stack).to(device)
    return MicroBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=torch.from_numpy(loss_mask).to(device),
        position_ids=torch.arange(sequence_length, device=device).repeat(len(rows), 1),
        sample_ids=sample_ids,
    )
