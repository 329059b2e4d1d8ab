"""Weights that live in FP8, over data-parallel ranks: Megatron's optimizer casts slices and gathers bytes."""

import numpy as np
import pytest

from tests.support import fp8_reference as reference
from tests.support.engine import LAYERS, needs_files, train_distributed
from tests.support.pool import WorkerPool

pytestmark = needs_files


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_weights_are_the_cast_of_their_masters(fresh_pool: WorkerPool, recipe: str) -> None:
    """Bit-equal to a cast of the whole master, rounded to bfloat16 first, though each rank casts its slice alone."""
    ranks = fresh_pool.run(train_distributed, recipe, True, world=3)
    assert len(ranks[0][1]) == 4 * LAYERS
    cut = 0
    for name, mine in ranks[0][1].items():
        parts = [weights[name] for _, weights in ranks]
        master = np.full(mine.codes.numel(), np.nan)
        for part in parts:
            master[part.start : part.start + part.master.numel()] = part.master.double().numpy()
        assert not np.isnan(master).any()
        cut += sum(part.master.numel() > 0 for part in parts) > 1
        matrix = reference.bfloat16(master).reshape(mine.codes.shape)
        if recipe == "tensorwise":
            scale = reference.current_scale(reference.amax(matrix), reference.E4M3)
            wanted = reference.per_tensor(matrix, reference.E4M3, scale)
        else:
            wanted = reference.block(matrix, reference.E4M3, 128, 128, reference.FLOAT_MAX)
        for part in parts:
            assert np.array_equal(part.codes.numpy(), wanted.codes), name
            rows, columns = wanted.inverse.shape
            inverse = part.inverse.double().numpy().reshape(-1, part.inverse.shape[-1])
            assert np.array_equal(inverse[:rows, :columns], wanted.inverse), name
    assert cut > 0, "some weights are cut between ranks"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_they_learn_as_weights_in_bf16_do(fresh_pool: WorkerPool, recipe: str) -> None:
    """Delayed scaling casts a weight with the scale of the step before it was updated, and begins later."""
    plain, held = (fresh_pool.run(train_distributed, recipe, in_fp8, world=2) for in_fp8 in (False, True))
    for (wanted, _), (found, _) in zip(plain, held, strict=True):
        if recipe == "delayed":
            assert found[-1] < 0.6 * found[0]
        else:
            assert np.allclose(found, wanted, rtol=0.02)
