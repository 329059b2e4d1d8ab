"""Transformer Engine's quantisers on a GPU: the bytes, scales and maxima that tests/support/fp8_reference.py says."""

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from megatron_capgap.config.validation import fp8
from tests.support import fp8_reference as reference
from tests.support.fp8_inputs import DTYPES, TARGETS, double, expected_buffers, inputs, quantiser

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
CAPABILITY = torch.cuda.get_device_capability() if GPUS else (0, 0)
ENGINE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="no CUDA GPU is visible"),
    pytest.mark.skipif(not ENGINE, reason="Transformer Engine is not installed"),
]


def recipe(name: str) -> Any:
    """A parameter that is skipped where the GPU lacks the kernels."""
    reason = f"{name} needs compute capability {fp8.generations(name)}, this is {CAPABILITY}"
    return pytest.param(name, marks=pytest.mark.skipif(not fp8.runs_on(name, CAPABILITY), reason=reason))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [recipe(name) for name in fp8.CAPABILITY])
def test_bytes_and_scales_are_the_reference_s(name: str, target: str, dtype: str) -> None:
    rows, columns = (64, 96) if name == "mxfp8" else (144, 176)
    for kind in ("normal", "wide", "zero", "huge"):
        values, amax = inputs(rows, columns, DTYPES[dtype])[kind], torch.zeros(1, device="cuda")
        found = vars(quantiser(name, target, amax)(values.cuda()))
        for key, wanted in expected_buffers(name, target, values, weight=False).items():
            if found.get(key) is None:
                continue  # Hopper keeps a transpose where others need none
            mine = found[key].cpu().numpy()
            if not key.endswith("data"):
                mine = mine[tuple(slice(size) for size in wanted.shape)]  # the rest is padding
            assert np.array_equal(mine.reshape(wanted.shape), wanted), (kind, key)
        if name == "delayed":
            assert amax.item() == reference.amax(double(values)), kind
