"""Which rank reads which sample, and what a micro-batch holds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_capgap.data.batch import MicroBatch, collate, global_batch_samples, micro_batches

SEQUENCE = 6
CPU = torch.device("cpu")


class Counting:
    """Sample k is k * 100, k * 100 + 1, ...; there are `length` of them."""

    sequence_length = SEQUENCE

    def __init__(self, length: int = 10**9) -> None:
        self.length = length

    def tokens(self, k: int) -> np.ndarray:
        assert 0 <= k < self.length, f"sample {k} does not exist"
        return np.arange(k * 100, k * 100 + SEQUENCE + 1)

    def micro_batch(self, indices: list[int | None], ids: list[int], device: torch.device) -> MicroBatch:
        return collate([None if k is None else self.tokens(k) for k in indices], ids, SEQUENCE, device)


def deal(samples: range, micro_batch: int, data_size: int, limit: int | None = None) -> list[list[MicroBatch]]:
    sequence = Counting() if limit is None else Counting(limit)
    return [
        list(micro_batches(sequence, samples, micro_batch, rank, data_size, CPU, limit)) for rank in range(data_size)
    ]


def test_steps_follow_on_each_other() -> None:
    assert global_batch_samples(0, 4) == range(0, 4)
    assert [k for step in range(3) for k in global_batch_samples(step, 5)] == list(range(15))


def test_the_rule() -> None:
    ranks = deal(range(8, 16), micro_batch=2, data_size=2)
    assert [[batch.sample_ids for batch in rank] for rank in ranks] == [
        [[8, 9], [12, 13]],
        [[10, 11], [14, 15]],
    ]


@given(
    micro_batch=st.integers(1, 4),
    data_size=st.integers(1, 4),
    turns=st.integers(1, 3),
    step=st.integers(0, 10**6),
)
def test_ranks_share_a_global_batch_whatever_the_layout(
    micro_batch: int, data_size: int, turns: int, step: int
) -> None:
    samples = global_batch_samples(step, micro_batch * data_size * turns)
    ranks = deal(samples, micro_batch, data_size)
    assert all(len(rank) == turns for rank in ranks)
    assert sorted(k for rank in ranks for batch in rank for k in batch.sample_ids) == list(samples)
    rows = [row for rank in ranks for batch in rank for row in batch.tokens.tolist()]
    assert sorted(rows) == [list(range(100 * k, 100 * k + SEQUENCE)) for k in samples]


def test_a_global_batch_that_does_not_divide_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="6 samples over 2 ranks of 2"):
        deal(range(6), micro_batch=2, data_size=2)


def test_contents() -> None:
    (batch,) = deal(range(2), micro_batch=2, data_size=1)[0]
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert torch.equal(batch.position_ids, torch.arange(SEQUENCE).repeat(2, 1))
    assert batch.loss_mask.dtype == torch.float32 and batch.loss_mask.sum() == 2 * SEQUENCE
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


@given(held_out=st.integers(1, 40), micro_batch=st.integers(1, 4), data_size=st.integers(1, 4))
def test_held_out_samples_count_once_in_every_layout(held_out: int, micro_batch: int, data_size: int) -> None:
    step = micro_batch * data_size
    samples = range(-(-held_out // step) * step)
    batches = [batch for rank in deal(samples, micro_batch, data_size, limit=held_out) for batch in rank]
    assert sum(batch.loss_mask.sum().item() for batch in batches) == held_out * SEQUENCE
    for batch in batches:
        for k, row, mask in zip(batch.sample_ids, batch.labels, batch.loss_mask, strict=True):
            assert mask.unique().tolist() == [float(k < held_out)]
            assert k < held_out or row.unique().tolist() == [0]


def test_collate_pads_missing_rows() -> None:
    batch = collate([None, np.arange(SEQUENCE + 1)], [9, 1], SEQUENCE, CPU)
    assert batch.tokens.tolist() == [[0] * SEQUENCE, list(range(SEQUENCE))]
    assert batch.loss_mask.tolist() == [[0.0] * SEQUENCE, [1.0] * SEQUENCE]
    assert batch.sample_ids == [9, 1]


def test_flat_follows_the_hidden_states() -> None:
    (batch,) = deal(range(3), micro_batch=3, data_size=1)[0]
    labels, mask = batch.flat()
    hidden = torch.zeros(SEQUENCE, 3, 1)  # [s, b, h]
    for s in range(SEQUENCE):
        for b in range(3):
            hidden[s, b] = batch.labels[b, s]
    assert torch.equal(labels, hidden.reshape(-1).long()) and mask.shape == labels.shape
