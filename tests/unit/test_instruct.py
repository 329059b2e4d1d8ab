"""Conversations as samples: what is learned, what is cut, which share a row, and what a row looks like."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.chat_template import Segment, Template
from megatron_capgap.data.conversation_packing import Example, PackedConversationDataset, collate, encode, pack
from megatron_capgap.data.messages import Conversation, Message

CPU = torch.device("cpu")


class Letters(Template):
    """A token a letter; what the assistant says is learned."""

    def encode(self, conversation):
        return [Segment(tuple(map(ord, m.text)), m.role == "assistant") for m in conversation]

    def end_of_turn_ids(self):
        return frozenset()


def talk(*texts: str) -> Conversation:
    return Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


def test_the_assistant_s_words_are_learned() -> None:
    (example,), cut = encode([talk("ab", "cd", "e", "fg")], Letters(), 10)
    assert example.tokens.tolist() == [*map(ord, "abcdefg")]
    # b predicts c, c predicts d; e predicts f, f predicts g.
    assert example.in_loss.tolist() == [False, True, True, False, True, True]
    assert (cut.shortened, cut.dropped) == (0, 0)


def test_what_is_too_long_loses_its_end() -> None:
    found, cut = encode([talk("ab", "cdef"), talk("abcd", "e"), talk("a", "b")], Letters(), 3)
    assert [len(example) for example in found] == [3, 1]
    assert found[0].tokens.tolist() == [*map(ord, "abcd")] and found[0].in_loss.tolist() == [False, True, True]
    assert (cut.shortened, cut.dropped) == (1, 1)
    with pytest.raises(UserError, match=r"data.sequence_length: 2 is too short"):
        encode([talk("abcd", "e")], Letters(), 2)


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_rows_hold_every_conversation_once_and_few_are_half_empty(lengths: list[int]) -> None:
    rows = pack(lengths, 32)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) <= 32
    assert sum(2 * tokens <= 32 for tokens in filled) <= 1, "two of these would fit into one row"


def examples(*lengths: int) -> list[Example]:
    return [Example(np.arange(n + 1) + 10 * i, np.ones(n, dtype=bool)) for i, n in enumerate(lengths)]


def test_every_epoch_reads_every_row_in_an_order_of_its_own() -> None:
    sequence = PackedConversationDataset(examples(*[5] * 40), 8, seed=3)
    epochs = [[int(sequence.conversations(k)[0].tokens[0]) for k in range(e * 40, e * 40 + 40)] for e in range(3)]
    assert all(sorted(epoch) == [10 * i for i in range(40)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    held_out = PackedConversationDataset(examples(5, 6, 7), 8, seed=None)
    assert [int(held_out.conversations(k)[0].tokens[0]) for k in range(3)] == [20, 10, 0], "longest first"


def test_a_packed_row() -> None:
    first, second, third = examples(2, 3, 4)
    first.in_loss[0] = False
    batch = collate([[first, second], None, [third]], [7, 8, 9], 6, CPU)
    assert batch.tokens[0].tolist() == [0, 1, 10, 11, 12, 0]
    assert batch.labels[0].tolist() == [1, 2, 11, 12, 13, 0]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 1, 1, 0], [0] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0], [*range(6)], [0, 1, 2, 3, 0, 1]]
    belongs = [0, 0, 1, 1, 1, 2]
    sees = [[j <= i and belongs[j] == belongs[i] for j in range(6)] for i in range(6)]
    assert (~batch.attention_mask[0, 0]).tolist() == sees
    assert (~batch.attention_mask[1, 0]).tolist() == [[j <= i for j in range(6)] for i in range(6)]
    assert batch.sample_ids == [7, 8, 9]
