"""The tool broken on purpose, where a round trip would not tell: comparing logits must."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_capgap.config import derived
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion import family, importing
from megatron_capgap.conversion.families import llama
from megatron_capgap.conversion.registry import FAMILIES
from megatron_capgap.models import packing
from tests.support import hf_models
from tests.support.pool import WorkerPool
from tools import convert_hf


def neighbours_turn(shape: ModelShape) -> Iterator[packing.PackedRows]:
    """Rows of queries and keys in the order of interleaved rotary positions: each row once, in another place."""
    width = derived.head_dim(shape)
    for run in packing.qkv(shape):
        for i in range(run.count):
            head, channel = divmod(i, width)
            place = i if run.part == 2 else head * width + channel % 2 * (width // 2) + channel // 2
            yield packing.PackedRows(run.part, run.start + place, run.packed + i, 1)


def without_biases(self: Any, piece: Any) -> torch.Tensor:
    """A piece as it is read, but the biases of queries, keys and values are left at zero."""
    rows = READ(self, piece)
    return torch.zeros_like(rows) if piece.entry.key.endswith("linear_qkv.bias") else rows


def theta_by_default(*args: Any) -> dict[str, Any]:
    """Rotary positions without the base that config.json gives."""
    return {**ROTARY(*args), "rope_theta": 10000.0}


READ, ROTARY = importing._BlockReader.__call__, llama.rotary
BREAKS = {
    "permutation": lambda: mock.patch.dict(family.PACKINGS, qkv=lambda shape: list(neighbours_turn(shape))),
    "bias": lambda: mock.patch.object(importing._BlockReader, "__call__", without_biases),
    "theta": lambda: mock.patch.object(llama, "rotary", theta_by_default),
    "nothing": lambda: mock.patch.dict(family.PACKINGS),
}


def sabotaged(name: str, words: list[str]) -> int:
    """Runs in a worker: the tool with one part of it wrong."""
    broken: AbstractContextManager[Any] = BREAKS[name]()
    with broken:
        return convert_hf.main(words)


@pytest.mark.parametrize(
    ("model", "name", "code"),
    [
        ("llama", "permutation", 1),
        ("qwen2", "permutation", 1),
        ("qwen2", "bias", 1),
        ("llama", "theta", 1),
        ("llama3", "theta", 1),
        ("gpt_neox", "theta", 1),
        ("qwen2", "nothing", 0),
    ],
)
def test_verify_sees_a_broken_import(pool: WorkerPool, tmp_path: Path, model: str, name: str, code: int) -> None:
    hf, run = (str(tmp_path / folder) for folder in ("hf", "run"))
    hf_models.save(model, tmp_path / "hf")
    words = ["import", "--hf", hf, "--out", run]
    assert pool.run(sabotaged, name, words, world=1, initialise=False) == [0]
    (rank,) = pool.run(
        convert_hf.main, ["verify", "--hf", hf, "--checkpoint", run], world=1, initialise=False, capture=True
    )
    assert rank.value == code, rank.stdout
    assert ("first in layer 0" in rank.stdout) == (code == 1), rank.stdout


def test_a_table_that_forgets_a_tensor_is_seen(pool: WorkerPool, tmp_path: Path) -> None:
    """What is to be filled is asked of the model, so that a row cannot be missing silently."""
    hf_models.save("qwen2", tmp_path / "hf")
    words = ["import", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run")]
    with pytest.raises(Exception, match=r"the table and the model differ in .*linear_qkv\.bias"):
        pool.run(forgetting_biases, words, world=1, initialise=False)
    assert not (tmp_path / "run").exists()


def forgetting_biases(words: list[str]) -> int:
    """Runs in a worker: Qwen 2 without the row for its biases."""
    mappings = tuple(each for each in FAMILIES["qwen2"].mappings if not each.megatron.endswith("linear_qkv.bias"))
    with mock.patch.dict(FAMILIES, qwen2=replace(FAMILIES["qwen2"], mappings=mappings)):
        return convert_hf.main(words)
