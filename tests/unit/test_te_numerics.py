"""Casts, scales and maxima of Transformer Engine's four FP8 recipes on the CPU: bit-equal to formulas written apart."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_capgap.devices.transformer_engine_cpu import formats, quantize
from tests.support import fp8_reference as reference
from tests.support.engine import needs_files, start
from tests.support.fp8_inputs import DTYPES, INFINITY, double, expected_buffers, inputs, quantiser
from tests.support.pool import WorkerPool

PAIRS = {"e4m3": (formats.E4M3, reference.E4M3), "e5m2": (formats.E5M2, reference.E5M2)}


@pytest.mark.parametrize("name", PAIRS)
def test_every_bfloat16_and_the_halves_between_codes_are_cast_to_the_nearest(name: str) -> None:
    ours, theirs = PAIRS[name]
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    middles = [(low + high) / 2 for low, high in itertools.pairwise(theirs.values)]
    beside = torch.tensor(middles, dtype=torch.float32)
    beside = torch.cat([beside, torch.nextafter(beside, beside * 0), torch.nextafter(beside, beside * 4)])
    for values, scale in itertools.product((every, beside, -beside), (1.0, 0.37, 2.0**-30, 3.0e38)):
        found = ours.cast(values, torch.tensor(scale))
        expected = reference.cast(double(values), float(np.float32(scale)), theirs)
        assert np.array_equal(found.numpy(), expected), scale


@pytest.mark.parametrize("name", PAIRS)
def test_codes_are_read_as_they_are_listed(name: str) -> None:
    ours, theirs = PAIRS[name]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert np.array_equal(double(ours.decode(codes)), np.array(theirs.codes), equal_nan=True)


AMAXES = (0.0, 1.0e-45, 1.0e-39, 1.3e-36, 1.0e-20, 0.3, 1.0, 448.0, 449.0, 57344.0, 1.0e30, 3.4028235e38, INFINITY)


@pytest.mark.parametrize("name", PAIRS)
def test_scales_and_shared_exponents(name: str) -> None:
    ours, theirs = PAIRS[name]
    generator = torch.Generator().manual_seed(1)
    many = torch.exp2(torch.rand(3000, generator=generator) * 270 - 148)
    powers = ours.largest * torch.exp2(torch.arange(-149, 118).double()).float()
    amax = torch.cat([torch.tensor(AMAXES), many, powers, torch.nextafter(powers, powers * 2)])
    exponents = formats.shared_exponent(amax, ours.largest).tolist()
    assert exponents == [reference.exponent_of(value, theirs) for value in double(amax).tolist()]
    for power_of_two, overflow in itertools.product((False, True), (reference.FLOAT_MAX, reference.BF16_MAX)):
        found = formats.scale_from_amax(amax, ours.largest, 0.0, power_of_two, overflow)
        options = {"power_of_two": power_of_two, "overflow": overflow}
        assert found.tolist() == [reference.scale_of(value, theirs, **options) for value in double(amax).tolist()]


def test_a_floor_under_the_maximum() -> None:
    amax = torch.tensor([0.0, 1.0e-6, 2.0])
    assert formats.scale_from_amax(amax, 448.0, 0.5, False, 1.0).tolist() == [896.0, 896.0, 224.0]


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_scales_of_delayed_scaling_over_many_steps(name: str, margin: int, length: int, algorithm: str) -> None:
    dtype = {"e4m3": formats.DType.kFloat8E4M3, "e5m2": formats.DType.kFloat8E5M2}[name]
    generator = torch.Generator().manual_seed(length)
    numbers = torch.exp2(torch.rand(24, 5, generator=generator) * 40 - 20)
    numbers[3] = numbers[4] = 0.0
    numbers[7, 1], numbers[9, 2], numbers[10, 2], numbers[12, 3] = INFINITY, 1.0e-42, 1.0e-42, 0.0
    twins = [reference.Delayed(PAIRS[name][1], length, algorithm, margin) for _ in range(5)]
    histories, scales = [torch.zeros(length, 3), torch.zeros(length, 2)], [torch.ones(3), torch.ones(2)]
    for row in numbers:
        for twin, number in zip(twins, row.tolist(), strict=True):
            twin.record(number)
            twin.update()
        for history, part in zip(histories, row.split([3, 2]), strict=True):
            history[0] = part  # what this rank saw; the reduced maxima come in one buffer
        quantize.fused_amax_and_scale_update_after_reduction(row, histories, scales, algorithm, dtype, margin)
        assert torch.cat(scales).tolist() == [twin.scale for twin in twins]
        assert torch.cat(histories, 1).t().tolist() == [twin.history for twin in twins]


def test_the_reduced_maximum_goes_before_this_rank_s_own() -> None:
    history, scale = torch.tensor([[2.0, 2.0]]), torch.ones(2)
    reduced = torch.tensor([8.0, 0.0])
    arguments = "max", formats.DType.kFloat8E4M3, 0
    quantize.fused_amax_and_scale_update_after_reduction(reduced, [history], [scale], *arguments)
    assert scale.tolist() == [56.0, 224.0] and history.tolist() == [[0.0, 0.0]]


def quantise_in_worker(recipe: str, name: str, values: Tensor, weight: bool, internal: bool) -> dict[str, Any]:
    """The buffers that Transformer Engine's own quantiser fills, made anew, then overwritten after other values."""
    start()
    amax = torch.zeros(1)
    quantizer = quantiser(recipe, name, amax, weight=weight)
    quantizer.internal = internal
    found = quantizer(values)
    parts = {key: value for key, value in vars(found).items() if isinstance(value, Tensor)}
    if not internal:
        again = quantizer(torch.zeros_like(values))
        quantizer.update_quantized(values, again)
        for key, value in parts.items():
            assert torch.equal(getattr(again, key), value), key
        if recipe != "blockwise":
            parts["dequantised"] = found.dequantize(dtype=torch.float32)
    return {**parts, "amax": amax}


@needs_files
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("recipe", "name", "weight"),
    [
        ("delayed", "e4m3", False),
        ("delayed", "e5m2", False),
        ("tensorwise", "e4m3", False),
        ("tensorwise", "e5m2", False),
        ("blockwise", "e4m3", False),
        ("blockwise", "e5m2", False),
        ("blockwise", "e4m3", True),
        ("mxfp8", "e4m3", False),
        ("mxfp8", "e5m2", False),
    ],
)
def test_quantisers_fill_the_buffers_that_the_recipe_says(
    fresh_pool: WorkerPool, recipe: str, name: str, weight: bool, dtype: str
) -> None:
    rows, columns = (64, 96) if recipe == "mxfp8" else (144, 176)
    for kind, values in inputs(rows, columns, DTYPES[dtype]).items():
        shaped, expected = values.view(2, rows // 2, columns), expected_buffers(recipe, name, values, weight)
        for internal in (False, True):
            (found,) = fresh_pool.run(quantise_in_worker, recipe, name, shaped, weight, internal, world=1)
            for key, wanted in expected.items():
                mine = found[key].numpy()
                if not key.endswith("data"):
                    assert not mine[wanted.shape[0] :].any()
                    mine = mine[tuple(slice(size) for size in wanted.shape)]  # the rest is padding
                assert np.array_equal(mine.reshape(wanted.shape), wanted), (kind, key)
            if recipe == "delayed":
                assert found["amax"].item() == reference.amax(double(values)), kind


def empty_in_worker(recipe: str, internal: bool) -> tuple[bool, list[str], float]:
    """Whether an empty tensor has the buffers of a full one, which of its values differ once it is filled, and the
    maximum that making it has recorded."""
    start()
    amax = torch.zeros(1)
    quantizer = quantiser(recipe, "e4m3", amax)
    quantizer.internal = internal
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    empty = quantizer.make_empty(values.shape, dtype=torch.float32, device="cpu")
    seen, full = amax.item(), quantizer(values)

    def buffers(tensor: Any) -> dict[str, Tensor]:
        return {key: value for key, value in vars(tensor).items() if isinstance(value, Tensor)}

    sizes = [{key: value.shape for key, value in buffers(one).items()} for one in (empty, full)]
    quantize.quantize(values, quantizer, empty)
    different = [key for key, value in buffers(full).items() if not torch.equal(getattr(empty, key), value)]
    return type(empty) is type(full) and sizes[0] == sizes[1], different, seen


@needs_files
@pytest.mark.parametrize("internal", [False, True])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_an_empty_tensor_is_one_to_be_overwritten(fresh_pool: WorkerPool, recipe: str, internal: bool) -> None:
    assert fresh_pool.run(empty_in_worker, recipe, internal, world=1) == [(True, [], 0.0)]
