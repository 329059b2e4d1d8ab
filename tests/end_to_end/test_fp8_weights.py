"""Runs whose weights live in FP8, on the CPU over emulated kernels, beside the same runs with weights in bf16."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_fp8 import BATCH, LAYOUTS, SHAPE, adapt, config_of, run
from tests.support import pruning, runs
from tests.support.engine import needs_files
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures, assert_close
from tests.support.state import kinds_of, run_engine, run_scoring, written_of
from tools import convert_hf

RECIPES = ("delayed", "tensorwise", "blockwise")
LINEARS = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
# Buffers of their own add up the gradient norm in another order: clipping would carry that into the weights.
UNCLIPPED = {"optimizer__clip_norm": 0.0}
pytestmark = [pytest.mark.slow("8-bit casts are emulated on a CPU"), needs_files]


def precision(recipe: str, held: bool) -> dict[str, Any]:
    """bf16 with the layers' matrix products in FP8; `held`: with the weights in it too."""
    history = {"amax_history": 16} if recipe == "delayed" else {}
    return {"compute": "bf16", "fp8": {"recipe": recipe, "param_gather": held, **history}}


@pytest.fixture(scope="module")
def trained(fresh_pool: WorkerPool, fixtures: Fixtures) -> Callable[..., Path]:
    """From a recipe, whether it holds the weights, and a number of ranks to the folder of a run."""

    @cache
    def folder(recipe: str, held: bool, world: int = 1) -> Path:
        run_dir = fixtures.folder / "fp8_weights" / f"{recipe}_{held}_{world}"
        often = {"checkpoint__every": 2, "checkpoint__keep": 3, **UNCLIPPED}
        adapt(fresh_pool, fixtures, run_dir, world, precision=precision(recipe, held), **often)
        return run_dir

    return folder


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_they_learn_as_weights_in_bf16_do(trained: Callable[..., Path], recipe: str, world: int) -> None:
    """A step's masters are rounded to bf16 and cast with the scales that a cast in the next forward pass would have: to
    the last digit."""
    plain, held = (runs.steps_of(trained(recipe, held, world)) for held in (False, True))
    assert [step["loss"] for step in held] == [step["loss"] for step in plain]
    for found, wanted in zip(held, plain, strict=True):
        assert_close(found, wanted, 1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gathered_while_the_forward_pass_runs(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, trained: Any, recipe: str
) -> None:
    """Two replicas with overlap and a save after every step, which gathers by itself: transposed copies are renewed."""
    often = {"checkpoint__every": 1, "train__overlap": True, **UNCLIPPED}
    adapt(fresh_pool, fixtures, tmp_path / "run", 2, precision=precision(recipe, True), **often)
    found, wanted = runs.steps_of(tmp_path / "run"), runs.steps_of(trained(recipe, True, 2))
    assert [step["loss"] for step in found] == [step["loss"] for step in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert_close(mine, theirs, 1e-6)


def test_they_are_there_and_masters_begin_exact(fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"precision": precision("tensorwise", True), "student__model": {**SHAPE, "layers": 3}, "train__steps": 1}
    changes["precision"]["fp8"]["first_last_layers_bf16"] = 1
    words = ["adapt", "--config", runs.write_config(config_of(fixtures, tmp_path / "run", **changes))]
    ((code, seen),) = fresh_pool.run(run_engine, [], kinds_of, words, world=1, initialise=False)
    assert code == 0
    for step, kinds in seen.items():
        rounded = {name: off for name, (kind, off) in kinds.items() if kind == "Float8Tensor"}
        assert list(rounded) == [f"decoder.layers.1.{linear}.weight" for linear in LINEARS]
        assert all(1e-3 < off < 0.07 for off in rounded.values()), (step, rounded)
        assert all(off < 2**-8 for name, (_, off) in kinds.items() if name not in rounded), step


# Seen: 6e-4 under tensor 2, 1e-7 under pipeline 2, 0 with weights in bf16; and in step 3, where the masters were 1% too
# large or a moment zero, 5e-3 or more. Delayed scaling may carry the last digits further.
RESUMED = {"tensor": 2e-3, "pipeline": 1e-5, "without": 1e-6}


def test_only_who_writes_them_makes_copies(fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """The first of two data-parallel ranks, which hold the same weights: the other would fill its GPU for nothing."""
    changes = {"precision": precision("tensorwise", True), "student__model": SHAPE, "train__steps": 1}
    words = ["adapt", "--config", runs.write_config(config_of(fixtures, tmp_path / "run", **changes))]
    ranks = fresh_pool.run(run_engine, [], written_of, words, world=2, initialise=False)
    for (code, seen), device in zip(ranks, ("cpu", "meta"), strict=True):
        assert code == 0 and len(seen[1]) == len(LINEARS) * SHAPE["layers"]
        assert set(seen[1].values()) == {(device, "torch.bfloat16")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume(fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, trained: Any, recipe: str) -> None:
    def resumed(name: str, saved: Path, world: int = 1, held: bool = True, **changes: Any) -> list[dict[str, Any]]:
        run_dir = runs.rewind(saved, tmp_path / name, 2)
        return adapt(fresh_pool, fixtures, run_dir, world, precision=precision(recipe, held), **changes, **UNCLIPPED)

    saved = trained(recipe, True)
    unbroken = runs.steps_of(saved)
    assert resumed("same", saved) == unbroken
    found = {name: resumed(name, saved, 2, student__layout=layout) for name, layout in LAYOUTS.items()}
    found["without"] = resumed("without", saved, held=False)
    for name, steps in found.items():
        # Loss and gradient norm of step 2 come before the first update, those of step 3 tell of masters and moments.
        for index in (2, 3):
            assert_close(steps[index], unbroken[index], 2e-3 if recipe == "delayed" else RESUMED[name], name)
    back = resumed("back", trained(recipe, False))
    for found, wanted in zip(back, unbroken, strict=True):  # which the run with weights in bf16 equals
        assert_close(found, wanted, 1e-3 if recipe == "delayed" else 1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_beside_the_training(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, trained: Any, recipe: str
) -> None:
    """On two data-parallel ranks, each of which has masters and moments of its own."""
    changes = {"precision": precision(recipe, True), "checkpoint__async_save": True, **UNCLIPPED}
    saved, unbroken = tmp_path / "saved", runs.steps_of(trained(recipe, True, 2))
    often = {"checkpoint__every": 2, "checkpoint__keep": 3}
    assert adapt(fresh_pool, fixtures, saved, 2, **changes, **often) == unbroken
    assert adapt(fresh_pool, fixtures, runs.rewind(saved, tmp_path / "resumed", 2), 2, **changes) == unbroken


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_scores_by_gradient(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, trained: Any, recipe: str
) -> None:
    """A backward pass reads weights that were cast once as it reads those that every pass casts anew."""
    scores = []
    for held in (False, True):
        wanted = {"hidden": 128, "heads": 4, "kv_heads": 2, "importance": "gradient", "batches": 1}
        config = pruning.prune_config(fixtures, trained(recipe, False), tmp_path / str(held), wanted, {})
        config["teacher"]["precision"] = precision(recipe, held)
        words = ["prune", "--config", runs.write_config(config)]
        ((code, kinds),) = fresh_pool.run(run_scoring, words, world=1, initialise=False)
        assert code == 0 and any(kind.startswith("Float8") for kind in kinds) == held, kinds
        scores.append(json.loads((tmp_path / str(held) / "scores.json").read_text())["sums"])
    assert scores[0] == scores[1]


def test_a_teacher_and_an_evaluation(fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, trained: Any) -> None:
    """Without training the same casts are made, once."""
    saved, found = trained("blockwise", True), {}
    for held in (False, True):
        for name, layout in {"one": {}, **LAYOUTS}.items():
            changes = {**BATCH, "student__model": SHAPE, "student__layout": layout, "teacher__micro_batch": 8}
            changes |= {"train__steps": 1, "train__eval_batches": 1, "precision": {"engine": "transformer_engine"}}
            run_dir = tmp_path / f"{name}_{held}"
            config = runs.distill_config(
                fixtures, run_dir, saved, **changes, teacher__precision=precision("blockwise", held)
            )
            run(fresh_pool, "distill", config, world=2 if layout else 1)
            found[name, held] = runs.metrics(run_dir)
        evaluation = {"run_dir": str(tmp_path / f"evaluation_{held}"), "data": config["data"], "device": "cpu"}
        evaluation |= {"student": {"checkpoint": str(saved)}, "precision": precision("blockwise", held)}
        run(fresh_pool, "evaluate", evaluation)
        found["evaluation", held] = runs.metrics(Path(evaluation["run_dir"]))
    for name in ("one", *LAYOUTS, "evaluation"):
        assert found[name, True] == found[name, False] != [], name


def test_they_are_exported_and_come_back(pool: WorkerPool, tmp_path: Path, trained: Callable[..., Path]) -> None:
    saved = str(trained("tensorwise", True))
    for words in (
        ["export", "--checkpoint", saved, "--out", str(tmp_path / "hf")],
        ["verify", "--hf", str(tmp_path / "hf"), "--checkpoint", saved],
    ):
        assert pool.run(convert_hf.main, words, world=1, initialise=False) == [0], words
