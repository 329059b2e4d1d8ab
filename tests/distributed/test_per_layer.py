"""Layers that keep different numbers of parts: exactly those that are asked for, in one stored width whose rest is zero
and stays so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.config import derived
from tests.distributed.test_pruning import Planted, assert_the_same_logits, assert_what_stays, plant
from tests.support import hf_models, masked, pruning, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

_NEURONS = {0: [*range(32)], 1: [*range(0, 72, 3)], 2: [9, 10, 40, 71], 3: [*range(0, 72, 2)]}  # keep 40, 48, 68, 36
_WIDE = {0: [*range(0, 104, 2)], 1: [5, 6], 2: [*range(50, 74)], 3: [*range(26)]}  # keep 52, 102, 80, 78
_GROUPS = {0: [1], 1: [0, 2, 3], 2: [0, 3], 3: [1, 2]}  # keep 3, 1, 2, 2
# Heads and neurons are means over layers.
CASES = {
    "llama_grouped": Planted({"kv_heads": 2, "hidden": 24, "ffn": 48}, _GROUPS, {}, _NEURONS, [*range(0, 48, 2)]),
    "qwen3_grouped": Planted({"kv_heads": 2, "hidden": 42, "ffn": 48}, _GROUPS, {}, _NEURONS, [*range(5, 47, 7)]),
    "gpt2": Planted(
        {"heads": 3, "hidden": 32, "ffn": 78},
        {0: [1, 3], 1: [0, 1], 2: [0, 2, 4], 3: [0, 1, 2, 3, 5]},  # keep 4, 4, 3, 1
        {},
        _WIDE,
        [*range(0, 48, 3)],
    ),
    "gpt_neox": Planted({"heads": 2, "hidden": 48, "ffn": 78}, _GROUPS, {}, _WIDE, []),
}
# Three heads are what a layer keeps most, but tensor 2 divides four, and gpt_neox's hidden is four heads wide.
STORED = {
    ("llama_grouped", "one"): (3, 68),
    ("llama_grouped", "tp2_pp2_sp"): (4, 68),
    ("qwen3_grouped", "one"): (3, 68),
    ("qwen3_grouped", "tp2_pp2_sp"): (4, 68),
    ("gpt2", "one"): (4, 102),
    ("gpt2", "tp2_pp2_sp"): (4, 102),
    ("gpt_neox", "one"): (4, 102),
    ("gpt_neox", "tp2_pp2_sp"): (4, 102),
}


def tensors(folder: str) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, optimizer state included, by key. Runs in a worker."""
    from megatron_capgap.checkpoint.streaming import Block, Reader, TensorEntry

    reader = Reader(Path(folder))
    found = {key: kind for key, kind in reader.tensors().items() if kind[0]}
    return {key: reader.read(Block(TensorEntry(key, *kind, False), 0, 0, kind[0][0])) for key, kind in found.items()}


def exported(pool: WorkerPool, run_dir: Path, out: Path) -> tuple[int, int]:
    """Writes a run's model as a Hugging Face folder, and counts its parameters there: not zero, and all of them."""
    pruning.convert(pool, "export", "--checkpoint", str(run_dir), "--out", str(out))
    parameters = list(AutoModelForCausalLM.from_pretrained(out).parameters())
    return sum(int(p.count_nonzero()) for p in parameters), sum(p.numel() for p in parameters)


def verify(pool: WorkerPool, hf: Path, run_dir: Path, layout: dict[str, Any]) -> None:
    """The checkpoint, cut so, has the folder's logits."""
    cut = [str(layout.get(name, 1)) for name in ("tensor", "pipeline")]
    words = ["verify", "--hf", str(hf), "--checkpoint", str(run_dir), "--tolerance", "1e-5"]
    pruning.convert(pool, *words, "--tensor", cut[0], "--pipeline", cut[1], world=int(cut[0]) * int(cut[1]))


@pytest.mark.parametrize("layout, kind", [("one", "activation"), ("tp2_pp2_sp", "gradient")])
@pytest.mark.parametrize("name", CASES)
def test_what_is_dead_goes_from_each_layer_alone(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, name: str, layout: str, kind: str
) -> None:
    planted, (world, cut) = CASES[name], pruning.LAYOUTS[layout]
    model = plant(hf_models.build(name), planted)
    teacher = pruning.imported(pool, fixtures, model, tmp_path)
    prune = {**planted.numbers, "importance": kind, "per_layer": True}
    run_dir = runs.train(pool, "prune", pruning.prune_config(fixtures, teacher, tmp_path / "run", prune, cut), world)
    plan = json.loads((run_dir / "plan.json").read_text())
    assert_what_stays(plan, planted, masked.sizes(model))
    found = metadata.read(run_directory.locate(str(run_dir)))
    assert (derived.kv_heads(found.model), found.model.ffn) == STORED[name, layout]
    kept, stored = exported(pool, run_dir, tmp_path / "small")
    assert_the_same_logits(tmp_path / "small", model)
    assert (plan["parameters"]["kept"], plan["parameters"]["stored"]) == (kept, stored)
    assert found.padding == stored - kept > 0
    verify(pool, tmp_path / "small", run_dir, cut)


@pytest.mark.parametrize("name", ["llama_grouped", "qwen3_grouped", "gpt2"])
def test_padding_stays_zero_in_training(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, name: str) -> None:
    """Weights, their fp32 copy and Adam's moments: no gradient reaches it, and weight decay leaves zeros alone."""
    world, cut = pruning.LAYOUTS["tp2_sp"]
    teacher = pruning.imported(pool, fixtures, hf_models.build(name), tmp_path)
    prune = {"sparsity": 0.5, "multiple": 2, "per_layer": True}
    run_dir = runs.train(pool, "prune", pruning.prune_config(fixtures, teacher, tmp_path / "run", prune, cut), world)
    changes = {"student__model": None, "student__checkpoint": str(run_dir), "student__layout": cut, "train__steps": 5}
    raw = runs.adapt_config(fixtures, tmp_path / "trained", **changes, optimizer__weight_decay=0.5)
    trained = runs.train(pool, "adapt", raw, world)
    before, after = (pool.run(tensors, str(run_directory.locate(str(d))), world=1)[0] for d in (run_dir, trained))
    seen = 0
    for key, weights in before.items():
        if not key.startswith("decoder.layers."):
            continue  # rows of a vocabulary are padded by the layout
        zero, mine = weights == 0, {other: after[other] for other in after if other.endswith(key)}
        assert len(mine) == 4, mine.keys()
        for tensor in mine.values():
            assert not tensor[zero].any(), key
        assert (after[key] != weights)[~zero].float().mean() > 0.9, key
        seen += int(zero.sum())
    meta = metadata.read(run_directory.locate(str(trained)))
    assert seen == meta.padding > 0
    kept, stored = exported(pool, trained, tmp_path / "small")
    assert stored - kept == meta.padding
    plan = json.loads((run_dir / "plan.json").read_text())
    assert (plan["parameters"]["kept"], plan["parameters"]["stored"]) == (kept, stored)
    assert len(set(plan["kept_by_layer"]["ffn"])) > 1, "layers of one width would prove nothing"
    verify(pool, tmp_path / "small", trained, {"tensor": 2, "pipeline": 2})


def test_a_finished_one_is_left_alone_and_another_size_refused(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    raw = pruning.prune_config(fixtures, teacher, tmp_path / "run", {"ffn": 40, "per_layer": True}, {})
    (rank,) = runs.run_stage(pool, "prune", raw)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    counts = " ".join(map(str, plan["kept_by_layer"]["ffn"]))
    assert sum(plan["kept_by_layer"]["ffn"]) == 160
    assert rank.value == 0 and f"ffn kept per layer: {counts}\n" in rank.stdout, rank
    kept, stored = (f"{plan['parameters'][name]:,}" for name in ("kept", "stored"))
    assert f"parameters: {kept} kept, {stored} stored (" in rank.stdout
    (rank,) = runs.run_stage(pool, "prune", raw)
    assert rank.value == 0 and "nothing to do" in rank.stdout
    raw["prune"]["ffn"] = 48
    (rank,) = runs.run_stage(pool, "prune", raw)
    assert rank.value == 2
    assert (
        f"holds a student that keeps {plan['parameters']['kept_non_embedding']} non-embedding parameters" in rank.stderr
    )
