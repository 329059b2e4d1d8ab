"""NEFTune's noise: its size, and that it depends on the sample alone."""

from functools import partial

import numpy as np
import pytest
import torch

from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.data.conversation_packing import Example, collate
from tests.support.pool import WorkerPool

CPU = torch.device("cpu")
HIDDEN, LENGTH = 48, 24


def batch(*ids: int) -> MicroBatch:
    """Rows of two conversations of 7 and 12 tokens, 5 tokens of padding behind them."""
    examples = [Example(np.arange(n + 1), np.ones(n, dtype=bool)) for n in (7, 12)]
    return collate([examples] * len(ids), list(ids), LENGTH, CPU)


def drawn(*ids: int, alpha: float = 5.0, seed: int = 3) -> torch.Tensor:
    """Runs in a worker, for Megatron is imported once a device was chosen."""
    from megatron_capgap.devices import choose

    choose("cpu", 0)
    from megatron_capgap.training.neftune import noise

    return noise(batch(*ids), HIDDEN, alpha, seed)


def test_its_size_is_that_of_the_conversation(pool: WorkerPool) -> None:
    found = pool.run(drawn, *range(50), world=1)[0]
    assert found.shape == (LENGTH, 50, HIDDEN) and found.dtype == torch.float32
    for rows, length in ((slice(0, 7), 7), (slice(7, 19), 12)):
        bound = 5.0 / (length * HIDDEN) ** 0.5
        part = found[rows]
        assert 0.98 * bound < part.max() <= bound and -bound <= part.min() < -0.98 * bound
        # Uniform: mean 0, standard deviation bound / sqrt(3).
        assert abs(part.mean()) < 0.02 * bound
        assert part.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_it_is_the_sample_s_in_any_micro_batch(pool: WorkerPool) -> None:
    together = pool.run(drawn, 4, 5, 6, world=1)[0]
    apart = [pool.run(drawn, sample, world=1)[0] for sample in (4, 5, 6)]
    assert torch.equal(together, torch.cat(apart, dim=1))
    assert not torch.equal(together[:, 0], together[:, 1])
    assert not torch.equal(pool.run(partial(drawn, 4, seed=4), world=1)[0], apart[0])
    assert torch.equal(pool.run(partial(drawn, 4, alpha=10.0), world=1)[0], 2 * apart[0])
