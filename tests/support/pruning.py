"""Runs of the stage prune on tiny teachers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.config.loader import load
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import plain_steps, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures
from tools import convert_hf

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tp2_dp2": (4, {"tensor": 2}),
}
"""Ranks and layout by name."""


def imported(pool: WorkerPool, fixtures: Fixtures, model: PreTrainedModel, folder: Path) -> Path:
    """The run directory of a model that speaks the material's tokenizer."""
    tokenizer, run_dir = fixtures.folder / "tokenizer.model", folder / "teacher"
    model.save_pretrained(folder / "hf")
    shutil.copyfile(tokenizer, folder / "hf" / "tokenizer.model")
    convert(pool, "import", "--hf", str(folder / "hf"), "--out", str(run_dir))
    # transformers opens such a folder with the class of the model's family, which may add tokens of its own.
    checkpoint = run_directory.locate(str(run_dir))
    speaks = open_tokenizer(str(tokenizer)).fingerprint
    metadata.write(replace(metadata.read(checkpoint), tokenizer_fingerprint=speaks), checkpoint)
    return run_dir


def prune_config(
    fixtures: Fixtures, teacher: Path, run_dir: Path, prune: dict[str, Any], layout: dict[str, Any]
) -> dict[str, Any]:
    """Two global batches of eight samples in micro-batches of two."""
    config = runs.adapt_config(fixtures, run_dir, train__steps=None, train__eval_batches=None, data__valid=None)
    config["teacher"] = {"checkpoint": str(teacher)}
    config["student"] = {"layout": layout}
    config["prune"] = {"batches": 2, **prune}
    return config


def samples(pool: WorkerPool, raw: dict[str, Any]) -> list[torch.Tensor]:
    """The micro-batches `[b, s + 1]` that a run was scored on."""
    config = load(runs.write_config(raw), [], "prune").config
    cache, count = Path(config.run_dir) / "data_cache", 2 * config.train.global_batch
    rows = pool.run(plain_steps.samples, config.data, config.seed, cache, 0, count, world=1)[0]
    return list(rows.split(config.train.micro_batch))


def convert(pool: WorkerPool, *words: str, world: int = 1) -> None:
    """A call of tools/convert_hf.py that must succeed."""
    assert pool.run(convert_hf.main, list(words), world=world, initialise=False) == [0] * world
