"""Conversations as training samples: several to a row, none of which sees another; a loss on the assistant's words."""

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
    """One conversation: what is read, and which of the next tokens are learned."""

    tokens: np.ndarray
    """int64 `[n + 1]`."""
    learned: np.ndarray
    """bool `[n]`: whether the loss counts `tokens[1:]`."""

    def __len__(self) -> int:
        """Tokens that are predicted."""
        return len(self.learned)


@dataclass(frozen=True)
class PackingCounts:
    """What did not fit: into a row, or a prompt into the ids of the whole."""

    shortened: int
    """Conversations that lost their end."""
    dropped: int
    """Those of which no word of the assistant's was left."""
    joined: int = 0
    """Of those that were kept: where a token spans the place at which an answer begins (`Segment.joined`)."""


def encode(
    conversations: Sequence[Conversation], template: Template, sequence_length: int
) -> tuple[list[Example], PackingCounts]:
    """Tokens of every conversation, the first `sequence_length` of them.

    Where the tokenizer merges across the place at which an answer begins, the ids are those of the whole conversation,
    as in transformers, and not those of a prompt that ends there, with which generation begins; such conversations are
    counted.

    Raises:
        UserError: no conversation is left, or the template cannot write one down.
    """
    found: list[Example] = []
    shortened = dropped = joined = 0
    for conversation in conversations:
        try:
            segments = template.encode(conversation)
        except UserError as error:
            raise UserError(f"{conversation.place}: {error}" if conversation.place else str(error)) from None
        tokens = np.concatenate([np.array(s.tokens, dtype=np.int64) for s in segments])
        learned = np.concatenate([np.full(len(s.tokens), s.learned) for s in segments])
        example = Example(tokens[: sequence_length + 1], learned[1 : sequence_length + 1])
        if not example.learned.any():
            dropped += 1
            continue
        shortened += len(tokens) > sequence_length + 1
        starts = np.cumsum([0, *(len(s.tokens) for s in segments)])
        joined += any(s.joined and start <= sequence_length for s, start in zip(segments, starts, strict=False))
        found.append(example)
    if not found:
        raise UserError(
            f"data.sequence_length: {sequence_length} is too short: no conversation has a word of the assistant's "
            "within it; a longer one would do"
        )
    return found, PackingCounts(shortened, dropped, joined)


def pack(lengths: Sequence[int], sequence_length: int) -> list[list[int]]:
    """Which conversations share a row: the longest first, each into the fullest row that it fits into.

    Args:
        lengths: tokens of each conversation, none above `sequence_length`.
        sequence_length: tokens of a row.

    Returns:
        The numbers of the conversations of each row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the row), ascending
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


class InstructSequence:
    """Rows of packed conversations, numbered: every row once in each epoch, in an order of its own.

    Args:
        examples: conversations.
        sequence_length: tokens of a row.
        seed: decides the orders; None keeps the rows as they are (held-out data).
        packed: False gives every conversation a row of its own.
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

    def micro_batch(self, there: Sequence[int | None], ids: list[int], device: torch.device) -> MicroBatch:
        """As `batch.Samples`."""
        rows = [None if k is None else self.conversations(k) for k in there]
        return collate(rows, ids, self.sequence_length, device)

    def conversations(self, k: int) -> list[Example]:
        """Those of row k; beyond the first epoch the rows come again, in another order."""
        epoch, position = divmod(k, len(self._rows))
        if self._seed is not None:
            position = shuffled(position, len(self._rows), f"{self._seed} instruct {epoch}")
        return [self._examples[i] for i in self._rows[position]]


def collate(rows: Sequence[Sequence[Example] | None], ids: list[int], length: int, device: torch.device) -> MicroBatch:
    """Lays conversations end to end in rows of `length` tokens; positions begin anew with each.

    Args:
        rows: the conversations of each row; None makes a row that counts for nothing.
        ids: numbers of the rows.
        length: tokens of a row.
        device: where the tensors go.
    """
    count = len(rows)
    tokens, labels, positions = (np.zeros((count, length), dtype=np.int64) for _ in range(3))
    # What is left of a row is one conversation more, which nobody learns from.
    belongs = np.full((count, length), -1, dtype=np.int64)
    mask = np.zeros((count, length), dtype=np.float32)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples or ()):
            place = np.s_[row, start : start + len(example)]
            tokens[place], labels[place], mask[place] = example.tokens[:-1], example.tokens[1:], example.learned
            positions[place], belongs[place] = np.arange(len(example)), number
            start += len(example)
        positions[row, start:] = np.arange(length - start)
    return MicroBatch(
        tokens=torch.from_numpy(tokens).to(device),
        labels=torch.from_numpy(labels).to(device),
        loss_mask=torch.from_numpy(mask).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        sample_ids=ids,
        conversations=torch.from_numpy(belongs).to(device),
    )
