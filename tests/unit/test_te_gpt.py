"""Megatron GPTs of Transformer Engine's layers on the CPU: they learn in every recipe, alone and cut in two."""

import pytest

from tests.support.engine import LAYERS, RECIPES, Case, Outcome, needs_files, train
from tests.support.pool import WorkerPool

PRODUCTS = 4 * LAYERS  # qkv, proj, fc1 and fc2 of each layer
pytestmark = needs_files


_outcomes: dict[str, Outcome] = {}


def run(pool: WorkerPool, case: Case) -> Outcome:
    """Trains on all ranks, which must agree on the losses to the last bit; each case once."""
    if repr(case) not in _outcomes:
        ranks = pool.run(train, case, world=case.tensor)
        assert all(rank.losses == ranks[0].losses for rank in ranks)
        _outcomes[repr(case)] = ranks[0]
    return _outcomes[repr(case)]


def relative(found: list[float], wanted: list[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(found, wanted, strict=True)]


@pytest.fixture(scope="module")
def plain(fresh_pool: WorkerPool) -> Outcome:
    """Without FP8, in fp32, on one rank."""
    return run(fresh_pool, Case())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_as_fp32_does(fresh_pool: WorkerPool, plain: Outcome, recipe: str) -> None:
    case = Case(recipe)
    found = run(fresh_pool, case)
    assert plain.losses[-1] < 0.6 * plain.losses[0]
    assert max(relative(found.losses, plain.losses)) < 0.05
    assert found.losses != plain.losses
    times = PRODUCTS * case.steps * case.micro_batches
    assert found.gemms == {
        ("fprop", "e4m3", "e4m3"): times,
        ("dgrad", "e5m2", "e4m3"): times,
        ("wgrad", "e5m2", "e4m3"): times,
    }


def test_two_ranks_without_fp8_are_one(fresh_pool: WorkerPool, plain: Outcome) -> None:
    found = run(fresh_pool, Case(tensor=2))
    assert max(relative(found.losses, plain.losses)) < 2.0e-6
    times = PRODUCTS * 3 * 2
    assert found.gemms == plain.gemms == {(part, "fp32", "fp32"): times for part in ("fprop", "dgrad", "wgrad")}


# Of the first step, before any update. Blockwise and MXFP8 cast the same tiles by the same scales, and delayed scaling
# begins with scale 1: what differs is the order of fp32 sums, which now and then moves a value to the next code.
# Tensorwise scales of cut weights, and of what is cut along features, are those of the shards.
FIRST_STEP = {"delayed": 2.0e-5, "tensorwise": 5.0e-3, "blockwise": 2.0e-5, "mxfp8": 2.0e-5}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_are_one_as_far_as_the_recipe_promises(fresh_pool: WorkerPool, recipe: str) -> None:
    one, two = (run(fresh_pool, Case(recipe, tensor=size)) for size in (1, 2))
    assert relative(two.losses, one.losses)[0] < FIRST_STEP[recipe]
    assert max(relative(two.losses, one.losses)) < 0.01
    assert two.gemms == one.gemms
    if recipe == "tensorwise":
        assert relative(two.losses, one.losses)[0] > FIRST_STEP["mxfp8"], "shards have scales of their own"


def test_delayed_scales_come_from_the_maxima_of_all_ranks(fresh_pool: WorkerPool) -> None:
    one, two = (run(fresh_pool, Case("delayed", tensor=size, steps=1, micro_batches=1)) for size in (1, 2))
    assert one.scales.keys() == two.scales.keys() and len(one.scales) == PRODUCTS
    for name, scales in one.scales.items():
        assert 1.0 not in scales, "every scale has been set"
        # A maximum is one value's; fp32 sums in another order move it by little.
        assert max(relative(two.scales[name], scales)) < 1.0e-4, name


@pytest.mark.parametrize("recipe", [None, "delayed", "mxfp8"])
def test_bf16_learns_too(fresh_pool: WorkerPool, plain: Outcome, recipe: str | None) -> None:
    one, two = (run(fresh_pool, Case(recipe, bf16=True, tensor=size)) for size in (1, 2))
    for found in (one, two):
        assert max(relative(found.losses, plain.losses)) < 0.05
    names = ("e4m3", "e5m2") if recipe else ("bf16", "bf16")
    assert {key[1:] for key in one.gemms} == {(names[0], names[0]), (names[1], names[0])}


def test_first_and_last_layers_stay_in_high_precision(fresh_pool: WorkerPool) -> None:
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
    found = run(fresh_pool, Case("tensorwise", steps=1, micro_batches=1, options=ends))
    assert found.gemms[("fprop", "fp32", "fp32")] == found.gemms[("fprop", "e4m3", "e4m3")] == PRODUCTS // 2


def test_layer_norm_learns_too(fresh_pool: WorkerPool) -> None:
    plain, found = (run(fresh_pool, Case(recipe, normalization="LayerNorm")) for recipe in (None, "blockwise"))
    assert max(relative(found.losses, plain.losses)) < 0.05
