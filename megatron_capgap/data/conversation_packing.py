"""Packs conversations into rows without attention between them; the loss counts assistant tokens only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.data.chat_template import Template
from megatron_capgap.data.messages import Conversation
from megatron_capgap.data.sampler import shuffled


@dataclass(frozen=True)
class Example:
    """One tokenized conversation with its loss mask."""

    tokens: np.ndarray
    """int64 `[n + 1]`."""
    in_loss: np.ndarray
    """bool `[n]`: whether the loss counts each of `tokens[1:]`."""

    def __len__(self) -> int:
        """Number of predicted tokens."""
        return len(self.in_loss)


@dataclass(frozen=True)
class PackingCounts:
    """Counts of conversations that did not fit into a row, or whose prompt has different ids than the conversation."""

    shortened: int
    """Truncated conversations."""
    dropped: int
    """Conversations dropped because truncation left no assistant token."""
    joined: int = 0
    """Kept conversations in which a token spans the start of an answer (`Segment.joined`)."""


def encode(
    conversations: Sequence[Conversation], template: Template, sequence_length: int
) -> tuple[list[Example], PackingCounts]:
    """Encodes every conversation, truncated to `sequence_length` predicted tokens.

    If the tokenizer merges across the start of an answer, the ids are those of the complete conversation, as in
    transformers, and differ from the prompt that generation starts with; such conversations are counted.

    Raises:
        UserError: no conversation is left, or the template fails at one.
    """
    found: list[Example] = []
    shortened = dropped = joined = 0
    for conversation in conversations:
        try:
            segments = template.encode(conversation)
        except UserError as error:
            raise UserError(f"{conversation.place}: {error}" if conversation.place else str(error)) from None
        tokens = np.concatenate([np.array(s.tokens, dtype=np.int64) for s in segments])
        in_loss = np.concatenate([np.full(len(s.tokens), s.in_loss) for s in segments])
        example = Example(tokens[: sequence_length + 1], in_loss[1 : sequence_length + 1])
        if not example.in_loss.any():
            dropped += 1
            continue
        shortened += len(tokens) > sequence_length + 1
        starts = np.cumsum([0, *(len(s.tokens) for s in segments)])
        joined += any(s.joined and start <= sequence_length for s, start in zip(segments, starts, strict=False))
        found.append(example)
    if not found:
        raise UserError(
            f"data.sequence_length: {sequence_length} is too short: no conversation has assistant text "
            "within it; increase it"
        )
    return found, PackingCounts(shortened, dropped, joined)


def pack(lengths: Sequence[int], sequence_length: int) -> list[list[int]]:
    """Assigns conversations to rows: longest first, each into the fullest row with room for it (best-fit decreasing).

    Args:
        lengths: tokens of each conversation, at most `sequence_length`.
        sequence_length: tokens in a row.

    Returns:
        Indices of the conversations of each row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row index), ascending
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[number], -1))
        if place == len(room):
            left, row = sequence_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(number)
        insort(room, (left - lengths[number], row))
    return rows


class PackedConversationDataset:
    """Numbered rows of packed conversations: every row once per epoch, in a different order in each epoch.

    Args:
        examples: the conversations.
        sequence_length: tokens in a row.
        seed: seed of the shuffles; None keeps the order of the rows.
        packed: False puts each conversation into a row of its own.
    """

    def __init__(
        self, examples: Sequence[Example], sequence_length: int, seed: int | None, *, packed: bool = True
    ) -> None:
        self.sequence_length = sequence_length
        self._examples, self._seed = examples, seed
        lengths = [len(example) for example in examples]
        self._rows = pack(lengths, sequence_length) if packed else [[i] for i in range(len(examples))]

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self._rows)

    def micro_batch(self, indices: Sequence[int | None], ids: list[int], device: torch.device) -> MicroBatch:
        """See `batch.TokenDataset.micro_batch`."""
        rows = [None if k is None else self.conversations(k) for k in indices]
        return collate(rows, ids, self.sequence_length, device)

    def conversations(self, k: int) -> list[Example]:
        """Conversations of row k; k may exceed one epoch, each epoch has its own order."""
        epoch, position = divmod(k, len(self._rows))
        if self._seed is not None:
            position = shuffled(position, len(self._rows), f"{self._seed} instruct {epoch}")
        return [self._examples[i] for i in self._rows[position]]


def collate(rows: Sequence[Sequence[Example] | None], ids: list[int], length: int, device: torch.device) -> MicroBatch:
    """Concatenates conversations into rows of `length` tokens; positions restart at each conversation.

    Args:
        rows: the conversations of each row; None gives a row with loss mask 0.
        ids: sample numbers of the rows.
        length: tokens in a row.
        device: device of the tensors.
    """
    count = len(rows)
    tokens, labels, positions = (np.zeros((count, length), dtype=np.int64) for _ in range(3))
    # The rest of a row is padding: it forms one more conversation (-1) with loss mask 0.
    segment_ids = np.full((count, length), -1, dtype=np.int64)
    mask = np.zeros((count, length), dtype=np.float32)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples or ()):
            place = np.s_[row, start : start + len(example)]
            tokens[place], labels[place], mask[place] = example.tokens[:-1], example.tokens[1:], example.in_loss
            positions[place], segment_ids[place] = np.arange(len(example)), number
            start += len(example)
        positions[row, start:] = np.arange(length - start)
    return MicroBatch(
        tokens=torch.from_numpy(tokens).to(device),
        labels=torch.from_numpy(labels).to(device),
        loss_mask=torch.from_numpy(mask).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        sample_ids=ids,
        segment_ids=torch.from_numpy(segment_ids).to(device),
    )
