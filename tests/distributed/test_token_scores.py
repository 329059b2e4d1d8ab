"""Scores of single tokens against logits made whole, in every split of the vocabulary."""

import pytest
import torch
import torch.distributed as dist

from megatron_capgap.losses import token_scores
from tests.support.pool import WorkerPool

TOKENS, WIDTH, VOCAB = 36, 7, 29


def scores_of_a_rank(padded: int, sequence: bool, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, head, labels = made()
    shards = torch.cat([head, torch.full((padded - VOCAB, WIDTH), 50.0)]).chunk(world)  # padding that would always win
    part = hidden.chunk(world)[rank] if sequence else hidden
    options = {"vocab_size": VOCAB, "group": dist.group.WORLD, "sequence_parallel": sequence, "chunk_tokens": chunk}
    return token_scores(part, shards[rank].contiguous(), labels, **options)


def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half of the labels are the likeliest; two columns are equal, across shards."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    head = torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64)
    head[25] = head[2]
    labels = torch.randint(VOCAB, (TOKENS,), generator=draw)
    labels[::2] = (hidden @ head.t()).argmax(1)[::2]
    return hidden, head, labels


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("world", "padded"), [(1, 29), (2, 32), (3, 60)])
def test_scores_equal_dense_ones(pool: WorkerPool, world: int, padded: int, sequence: bool, chunk: int) -> None:
    hidden, head, labels = made()
    logits = hidden @ head.t()
    expected = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    greedy = logits.argmax(1) == labels
    assert 0 < greedy.sum() < TOKENS
    for log_probs, said in pool.run(scores_of_a_rank, padded, sequence, chunk, world=world):
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-12)
        assert torch.equal(said, greedy)
