"""From numbered samples to the micro-batches of one data-parallel rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_capgap.data.sampler import dp_shard


@dataclass
class MicroBatch:
    """What one forward pass reads; replicated over the tensor- and pipeline-parallel ranks.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the token after each of `tokens`.
        loss_mask: float32 [b, s], 1 where a label counts.
        position_ids: int64 [b, s].
        sample_ids: number of the sample in each row.
        conversations: int64 [b, s], which of its row's conversations a token belongs to, -1 behind the last one;
            None where a token may look back over the whole row.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: list[int]
    conversations: torch.Tensor | None = None

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """Bool [b, 1, s, s], True where a token may not look; None means that it may not look ahead.

        Made when it is asked for: those of a whole global batch would be s bytes a token.
        """
        if self.conversations is None:
            return None
        length = self.tokens.shape[1]
        ahead = torch.ones(length, length, dtype=torch.bool, device=self.tokens.device).triu(1)
        return (ahead | ~self._together())[:, None]

    def lengths(self) -> torch.Tensor:
        """Int64 [b, s]: tokens of the conversation that each token belongs to."""
        return self._together().sum(-1)

    def _together(self) -> torch.Tensor:
        """Bool [b, s, s], whether two tokens belong to one conversation."""
        assert self.conversations is not None, "asked for where rows are packed of conversations alone"
        return self.conversations[:, :, None] == self.conversations[:, None, :]

    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and loss mask as vectors [s * b], in the order of hidden states [s, b, h] as [s * b, h]."""
        return self.labels.t().reshape(-1), self.loss_mask.t().reshape(-1)


class Samples(Protocol):
    """Numbered samples, of text or of conversations.

    Attributes:
        sequence_length: tokens of a row.
    """

    sequence_length: int

    def __len__(self) -> int:
        """Samples in one pass."""

    def micro_batch(self, there: Sequence[int | None], ids: list[int], device: torch.device) -> MicroBatch:
        """Some samples as rows.

        Args:
            there: their numbers; None makes a row that counts for nothing.
            ids: what the micro-batch calls them.
            device: where the tensors go.
        """


def global_batch_samples(step: int, global_batch: int) -> range:
    """Numbers of the samples of a step, which counts from 0."""
    return range(step * global_batch, (step + 1) * global_batch)


def micro_batches(
    sequence: Samples,
    samples: range,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    device: torch.device,
    limit: int | None = None,
) -> Iterator[MicroBatch]:
    """The micro-batches of one data-parallel rank, as `order.dealt` deals them.

    Args:
        limit: samples from this number on do not exist; their rows are padding that counts for nothing. With
            the length of a held-out set it lets every layout count each of its samples once.
    """
    for ids in dp_shard(samples, micro_batch, data_rank, data_size):
        yield read(sequence, ids, device, limit)


def read(sequence: Samples, ids: list[int], device: torch.device, limit: int | None = None) -> MicroBatch:
    """One micro-batch of the samples `ids`; `limit` as in `micro_batches`."""
    return sequence.micro_batch([k if limit is None or k < limit else None for k in ids], ids, device)


def collate(
    rows: Sequence[np.ndarray | None], sample_ids: list[int], sequence_length: int, device: torch.device
) -> MicroBatch:
    """Stack rows of int64 [sequence_length + 1] tokens; None makes a row of padding with loss mask 0."""
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
        position_ids=torch.arange(sequence_length, device=device).expand(len(rows), -1),
        sample_ids=sample_ids,
    )
