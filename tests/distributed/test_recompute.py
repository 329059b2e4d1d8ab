"""Activation recomputation: losses, gradient norms, weights and moments bit for bit those without, with dropout."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support import hf_models, pruning, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2_vp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
}
FULL, FIRST, PAIRS = {"what": "full"}, {"what": "full", "layers": 1}, {"what": "full", "every": 2}
MLP = {"what": "mlp"}
MODEL = {"hidden": 32, "heads": 4, "layers": 4, "ffn": 48, "vocab": runs.VOCAB, "max_positions": 40}
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"layers": 2, "hidden": 36, "ffn": 56},
    "gpt_neox": {"layers": 2, "hidden": 24, "heads": 2, "ffn": 80},
}
MATCHED = [{"student_layer": 1, "teacher_layer": 2}, {"student_layer": 4, "teacher_layer": 3, "kind": "cosine"}]
CASES = [
    *[("llama", "one", mode) for mode in (FULL, FIRST, PAIRS, MLP)],
    *[("llama", "tp2_sp", mode) for mode in (FULL, FIRST, PAIRS, MLP)],
    *[("llama", "tp2_pp2", mode) for mode in (FULL, PAIRS, MLP)],
    *[("llama", "pp2_vp2", mode) for mode in (FULL, MLP)],
    *[(family, "tp2_sp", FULL) for family in ("qwen2", "qwen3", "gpt2", "gpt_neox")],
    *[(family, "tp2_sp", MLP) for family in ("qwen2", "qwen3")],
    *[(family, "pp2_vp2", FULL) for family in ("gpt2", "gpt_neox")],
]

Run = Callable[..., tuple[list[dict[str, Any]], dict[str, str]]]


def state(run_dir: Path) -> dict[str, str]:
    """The bytes of the last checkpoint's shards, weights and moments."""
    files = sorted((run_dir / "checkpoints" / (run_dir / "latest").read_text().strip()).glob("*.distcp"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def run(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Metrics and final state of three distillation steps with dropout 0.1; a repeated run is made once."""

    @cache
    def run(family: str, layout: str, mode: tuple[tuple[str, Any], ...], matched: bool) -> Any:
        world, cut = LAYOUTS[layout]
        changes: dict[str, Any] = {"student__model": {"family": family, **MODEL}, "student__layout": cut}
        changes |= {"train__dropout": 0.1, "train__steps": 3, "train__eval_every": 2, "train__eval_batches": 1}
        changes |= {"student__recompute": dict(mode)} if mode else {}
        changes |= {"objective__matching": MATCHED if matched else []}
        raw = runs.distill_config(fixtures, tmp_path_factory.mktemp(layout) / "run", teacher, **changes)
        run_dir = runs.train(pool, "distill", raw, world)
        return runs.metrics(run_dir), state(run_dir)

    return lambda family, layout, mode, matched=False: run(family, layout, tuple(mode.items()), matched)


IDS = [f"{family}-{layout}-{'-'.join(map(str, mode.values()))}" for family, layout, mode in CASES]


@pytest.mark.parametrize("family, layout, mode", CASES, ids=IDS)
def test_a_run_is_the_same_bit_for_bit(run: Run, family: str, layout: str, mode: dict[str, Any]) -> None:
    assert run(family, layout, mode) == run(family, layout, {})


@pytest.mark.parametrize("layout", ["one", "pp2_vp2", "tp2_sp"])
def test_matched_layers_are_recomputed(run: Run, layout: str) -> None:
    """The hook on a matched layer is called twice, and its queue holds one micro-batch after the other."""
    assert run("llama", layout, FULL, True) == run("llama", layout, {}, True)


SCORED = [
    ("llama", "tp2_pp2_sp", "gradient", FULL),
    ("llama", "tp2_pp2_sp", "gradient", MLP),
    ("llama", "one", "gradient", FIRST),
    ("llama", "one", "activation", FULL),
    ("gpt_neox", "tp2_pp2_sp", "gradient", FULL),
]


@pytest.mark.parametrize("name, layout, kind, mode", SCORED)
def test_scores_are_the_same(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, name: str, layout: str, kind: str, mode: dict[str, Any]
) -> None:
    """The teacher's weights are frozen while prune scores it, so that only hidden states need a gradient."""
    source = pruning.imported(pool, fixtures, hf_models.build(name), tmp_path / "teacher")
    world, cut = pruning.LAYOUTS[layout]
    written = []
    for recompute in (None, mode):
        prune = TARGETS[name] | {"importance": kind}
        raw = pruning.prune_config(fixtures, source, tmp_path / f"run_{recompute is None}", prune, cut)
        raw["student"]["recompute"] = recompute
        written.append((runs.train(pool, "prune", raw, world) / "scores.json").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("mode", [FULL, MLP], ids=["full", "mlp"])
def test_packed_conversations_with_noise(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, mode: dict[str, Any]
) -> None:
    """Masks are inputs of a recomputed layer; NEFTune's noise is added before the first one."""
    student, found = runs.make_student(pool, fixtures), []
    for name, recompute in (("kept", {}), ("again", {"student__recompute": mode})):
        changes = {"finetune__neftune_alpha": 5.0, "train__dropout": 0.1, **recompute}
        raw = runs.finetune_config(fixtures, tmp_path / name, student, **changes)
        run_dir = runs.train(pool, "finetune", raw)
        found.append((runs.metrics(run_dir), state(run_dir)))
    assert found[0] == found[1]


def test_a_run_is_resumed_with_recomputation(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"train__dropout": 0.1, "train__steps": 4, "checkpoint__every": 2, "checkpoint__keep": 2}
    raw = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    unbroken = runs.train(pool, "adapt", raw)
    copy = runs.rewind(unbroken, tmp_path / "copy", step=2)
    runs.train(pool, "adapt", runs.changed(raw, run_dir=str(copy), student__recompute=FULL))
    assert runs.metrics(copy) == runs.metrics(unbroken)
    assert state(copy) == state(unbroken)
