"""Whole runs of Transformer Engine's layers, on the CPU over emulated kernels: engines, layouts, FP8, resume."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_capgap.checkpoint import safe_unpickle
from megatron_capgap.config.derived import recomputed_linears
from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.schema import FP8, Layout, ModelShape, Precision
from megatron_capgap.config.validation.fp8 import gemm_count
from tests.support import runs
from tests.support.engine import RECIPES, needs_files, run_counted
from tests.support.pool import RankResult, WorkerPool
from tests.support.runs import Fixtures, assert_close
from tests.support.state import run_engine, run_pickling, scales_of, state_of
from tools import convert_hf

# With tensor 2 as with 1, every side of a linear's weight is a multiple of 128, and so are a rank's tokens.
SHAPE = {"layers": 2, "hidden": 256, "heads": 8, "kv_heads": 4, "ffn": 256, "vocab": runs.VOCAB}
BATCH = {"train__global_batch": 16, "train__micro_batch": 8}
MICRO_BATCHES, STEPS = 2, 4
LAYOUTS = {"tensor": {"tensor": 2, "sequence": True}, "pipeline": {"pipeline": 2}}
pytestmark = [pytest.mark.slow("8-bit casts are emulated on a CPU"), needs_files]


def fp8(recipe: str, **options: Any) -> dict[str, Any]:
    """The precision of a configuration."""
    return {"fp8": {"recipe": recipe, **options}}


# Scales of later steps come from what was seen in all before.
DELAYED = fp8("delayed", amax_history=16)


def config_of(fixtures: Fixtures, run_dir: Path, **changes: Any) -> dict[str, Any]:
    return runs.adapt_config(
        fixtures, run_dir, **{**BATCH, "student__model": SHAPE, "train__steps": STEPS, "data__valid": None, **changes}
    )


def run(pool: WorkerPool, stage: str, config: dict[str, Any], world: int = 1) -> list[RankResult]:
    """Runs a stage that must succeed; the value of each rank is what it has multiplied, by part and formats."""
    words = [stage, "--config", runs.write_config(config)]
    ranks = pool.run(run_counted, words, world=world, initialise=False, capture=True)
    assert [rank.value[0] for rank in ranks] == [0] * world, ranks
    return [RankResult(rank.value[1], rank.stdout, rank.stderr) for rank in ranks]


def adapt(pool: WorkerPool, fixtures: Fixtures, run_dir: Path, world: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """Four steps of next-token training in Transformer Engine's layers."""
    run(pool, "adapt", config_of(fixtures, run_dir, **changes), world)
    return runs.steps_of(run_dir)


Whole = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(fresh_pool: WorkerPool, fixtures: Fixtures) -> Whole:
    """From a recipe to the steps of its run on one rank."""

    @cache
    def steps(recipe: str) -> list[dict[str, Any]]:
        precision = DELAYED if recipe == "delayed" else fp8(recipe)
        return adapt(fresh_pool, fixtures, fixtures.folder / "fp8" / recipe, precision=precision)

    return steps


@pytest.fixture(scope="module")
def local(pool: WorkerPool, fixtures: Fixtures) -> list[dict[str, Any]]:
    """The run with Megatron's local layers."""
    return runs.steps_of(runs.train(pool, "adapt", config_of(fixtures, fixtures.folder / "fp8" / "local")))


@pytest.fixture(scope="module")
def saved(fresh_pool: WorkerPool, fixtures: Fixtures) -> Path:
    """A run under delayed scaling, of which every second step is saved and evaluated."""
    run_dir = fixtures.folder / "fp8" / "saved"
    often = {"train__eval_every": 2, "checkpoint__every": 2, "checkpoint__keep": 3}
    adapt(fresh_pool, fixtures, run_dir, precision=DELAYED, data__valid=fixtures.data["valid"], **often)
    return run_dir


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_fp8_the_engine_changes_nothing(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, local: list[dict[str, Any]], layout: str
) -> None:
    changes = {"precision": {"engine": "transformer_engine"}, "student__layout": LAYOUTS[layout]}
    for found, expected in zip(adapt(fresh_pool, fixtures, tmp_path / "run", 2, **changes), local, strict=True):
        assert_close(found, expected, 1e-5, layout)


# How far tensor 2 may be from one rank, relatively, in the first step's loss. Blockwise and MXFP8 cast the same tiles
# by the same scales, delayed scaling begins with scale 1: what differs is the order of fp32 sums, which now and then
# moves a value to the next code. Tensorwise scales of a shard, and of what is cut along features, are its own.
FIRST_STEP = {"delayed": 2.0e-5, "tensorwise": 5.0e-3, "blockwise": 2.0e-5, "mxfp8": 2.0e-5}


@pytest.mark.parametrize("recipe", RECIPES)
def test_layouts_agree_as_far_as_the_recipe_promises(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, local: list[dict[str, Any]], whole: Whole, recipe: str
) -> None:
    one, precision = whole(recipe), DELAYED if recipe == "delayed" else fp8(recipe)
    found = {
        name: adapt(fresh_pool, fixtures, tmp_path / name, 2, precision=precision, student__layout=layout)
        for name, layout in LAYOUTS.items()
    }
    for index, step in enumerate(one):
        # A pipeline multiplies, casts and adds up the same tensors in the same order. Nothing less than equality holds
        # for long: where one weight's last digit is another, a cast flips within a few steps.
        assert found["pipeline"][index] == step, "pipeline"
        assert_close(found["tensor"][index], step, 2e-2, "tensor")
        assert 1e-6 < abs(step["loss"] / local[index]["loss"] - 1) < 1e-2, "it is FP8"
    first = abs(found["tensor"][0]["loss"] / one[0]["loss"] - 1)
    assert first < FIRST_STEP[recipe]
    assert (first > FIRST_STEP["mxfp8"]) == (recipe == "tensorwise")


@pytest.mark.parametrize("recipe, what", [*((recipe, "full") for recipe in RECIPES), ("delayed", "mlp")])
def test_recomputed_layers_give_the_same_steps(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, whole: Whole, recipe: str, what: str
) -> None:
    """Under delayed scaling a layer that is run twice must record its maxima once."""
    changes = {"precision": DELAYED if recipe == "delayed" else fp8(recipe), "student__recompute": {"what": what}}
    assert adapt(fresh_pool, fixtures, tmp_path / "run", **changes) == whole(recipe)


@pytest.mark.parametrize("what, forwards", [(None, 4), ("full", 8), ("mlp", 6)])
def test_as_many_products_as_were_announced(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, what: Literal["full", "mlp"] | None, forwards: int
) -> None:
    """Three layers of four linears, the one in the middle in FP8; `forwards` products of each run forward."""
    shape, precision = {**SHAPE, "layers": 3}, fp8("mxfp8", first_last_layers_bf16=1)
    changes = {"student__model": shape, "precision": precision, "train__steps": 1}
    again = []
    if what is not None:
        changes["student__recompute"] = {"what": what}
        again = recomputed_linears(Recompute(what), 3, Layout())
    model = Precision(fp8=FP8("mxfp8", first_last_layers_bf16=1))
    said = gemm_count(model, ModelShape(**shape), trains=True, again=again)
    (rank,) = run(fresh_pool, "adapt", config_of(fixtures, tmp_path / "run", **changes))
    line = f"{said.fp8} matrix products per micro-batch in FP8, {said.others} in fp32"
    assert line in " ".join(rank.stdout.split())
    exact = {(part, "fp32", "fp32"): 2 * 4 * MICRO_BATCHES for part in ("dgrad", "wgrad")}
    exact["fprop", "fp32", "fp32"] = 2 * forwards * MICRO_BATCHES
    backward = {(part, "e5m2", "e4m3"): 4 * MICRO_BATCHES for part in ("dgrad", "wgrad")}
    assert rank.value == {**exact, ("fprop", "e4m3", "e4m3"): forwards * MICRO_BATCHES, **backward}
    of_layers = sum(exact.values()), sum(rank.value.values()) - sum(exact.values())
    assert (MICRO_BATCHES * (said.others - 3), MICRO_BATCHES * said.fp8) == of_layers, "3 are the LM head's"


FAMILIES = {"gpt2": "delayed", "gpt_neox": "blockwise", "qwen3": "mxfp8"}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(
    pool: WorkerPool, fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, family: str
) -> None:
    shape = {"family": family, "layers": 2, "hidden": 128, "heads": 4, "ffn": 256, "vocab": runs.VOCAB}
    changes = {"student__model": {**shape, "max_positions": 32}, "train__steps": 2}
    runs.train(pool, "adapt", config_of(fixtures, tmp_path / "plain", **changes))
    precision = fp8(FAMILIES[family])
    (rank,) = run(fresh_pool, "adapt", config_of(fixtures, tmp_path / "fp8", precision=precision, **changes))
    for found, plain in zip(runs.steps_of(tmp_path / "fp8"), runs.steps_of(tmp_path / "plain"), strict=True):
        assert 0 < abs(found["loss"] / plain["loss"] - 1) < 1e-2
        assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=5e-2)
    formats = {"fprop": ("e4m3", "e4m3"), "dgrad": ("e5m2", "e4m3"), "wgrad": ("e5m2", "e4m3")}
    assert rank.value == {(part, *read): 2 * 4 * 2 * MICRO_BATCHES for part, read in formats.items()}


def test_evaluations_leave_delayed_scales_alone(whole: Whole, saved: Path) -> None:
    assert whole("delayed") == runs.steps_of(saved)


def test_a_bad_batch_leaves_delayed_scales_alone(fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    words = ["adapt", "--config"]
    words += [runs.write_config(config_of(fixtures, tmp_path / "run", precision=DELAYED, train__max_skipped=1))]
    ((code, states),) = fresh_pool.run(run_engine, [3], state_of, words, world=1, initialise=False)
    assert code == 0
    assert [states[step] == states[step - 1] for step in range(1, 5)] == [False, False, True, False]


def test_copies_of_a_model_have_the_same_delayed_scales(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path
) -> None:
    words = ["adapt", "--config"]
    words += [runs.write_config(config_of(fixtures, tmp_path / "run", precision=DELAYED, train__steps=1))]
    (code, states), other = fresh_pool.run(run_engine, [], scales_of, words, world=2, initialise=False)
    assert (code, states) == other and code == 0
    assert len(states[1]) == 4 * SHAPE["layers"] * 2 * 2 and states[1] != states[0]


def test_delayed_scales_are_resumed(
    pool: WorkerPool, fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, saved: Path, whole: Whole
) -> None:
    def resumed(name: str, world: int, **changes: Any) -> list[dict[str, Any]]:
        return adapt(fresh_pool, fixtures, runs.rewind(saved, tmp_path / name, 2), world, **changes)

    assert resumed("same", 1, precision=DELAYED) == whole("delayed")
    for name, layout in LAYOUTS.items():
        steps = resumed(name, 2, precision=DELAYED, student__layout=layout)
        assert steps[2]["loss"] == pytest.approx(whole("delayed")[2]["loss"], rel=1e-6 if name == "pipeline" else 1e-3)
    run_dir = runs.train(pool, "adapt", config_of(fixtures, runs.rewind(saved, tmp_path / "local", 2)))
    assert 1e-6 < abs(runs.steps_of(run_dir)[2]["loss"] / whole("delayed")[2]["loss"] - 1) < 1e-2


def entries_of(checkpoint: Path) -> dict[str, list[int] | None]:
    """The size of every entry of a checkpoint that speaks of scales; None where it is a pickle."""
    entries = safe_unpickle.read_metadata(checkpoint).metadata.state_dict_metadata.items()
    return {
        name: list(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in entries
        if safe_unpickle.SCALES in name or name.startswith("delayed_scaling.")
    }


LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def test_delayed_scales_are_plain_tensors_in_a_checkpoint(saved: Path) -> None:
    sizes = {"scale_fwd": [3], "amax_history_fwd": [16, 3], "scale_bwd": [2], "amax_history_bwd": [16, 2]}
    assert entries_of(saved / "checkpoints" / "step_2") == {
        f"delayed_scaling.decoder.layers.{linear}.{part}": [SHAPE["layers"], *size]
        for linear in LINEARS
        for part, size in sizes.items()
    }


def test_older_checkpoints_with_pickled_scales_are_resumed(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, whole: Whole
) -> None:
    old = tmp_path / "old"
    often = {"checkpoint__every": 2, "checkpoint__keep": 3}
    words = ["adapt", "--config", runs.write_config(config_of(fixtures, old, precision=DELAYED, **often))]
    assert fresh_pool.run(run_pickling, words, world=1, initialise=False) == [0]
    there = entries_of(old / "checkpoints" / "step_2")
    pickled = {f"decoder.layers.{linear}._extra_state/shard_{i}_2" for linear in LINEARS for i in range(2)}
    assert pickled == {name for name, size in there.items() if "linear" in name and size is None}

    for name, layout in {"same": {}, **LAYOUTS}.items():
        run_dir = runs.rewind(old, tmp_path / name, 2)
        steps = adapt(fresh_pool, fixtures, run_dir, 2 if layout else 1, precision=DELAYED, student__layout=layout)
        if name == "same":
            assert steps == whole("delayed")
        rel = 1e-3 if name == "tensor" else 1e-6
        assert steps[2]["loss"] == pytest.approx(whole("delayed")[2]["loss"], rel=rel)
        assert not any(safe_unpickle.SCALES in entry for entry in entries_of(run_dir / "checkpoints" / "step_4"))


def test_a_history_may_become_longer(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, saved: Path, whole: Whole
) -> None:
    """Four steps of two micro-batches fill neither length."""
    run_dir = runs.rewind(saved, tmp_path / "run", 2)
    assert adapt(fresh_pool, fixtures, run_dir, precision=fp8("delayed", amax_history=24)) == whole("delayed")
    name = "delayed_scaling.decoder.layers.mlp.linear_fc1.amax_history_fwd"
    assert entries_of(run_dir / "checkpoints" / "step_4")[name] == [SHAPE["layers"], 24, 3]


def test_a_run_under_delayed_scaling_is_exported(pool: WorkerPool, tmp_path: Path, saved: Path) -> None:
    for words in (
        ["export", "--checkpoint", str(saved), "--out", str(tmp_path / "hf")],
        ["verify", "--hf", str(tmp_path / "hf"), "--checkpoint", str(saved)],
        ["import", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "back")],
        ["verify", "--hf", str(tmp_path / "hf"), "--checkpoint", str(tmp_path / "back")],
    ):
        assert pool.run(convert_hf.main, words, world=1, initialise=False) == [0], words


# Where FP8 is, beside a model in fp32.
TAUGHT = {"neither": {}, "student": {"student__precision": fp8("blockwise")}}
TAUGHT["teacher"] = {"teacher__precision": fp8("mxfp8")}


def test_distilling_and_evaluating_in_every_layout(
    fresh_pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, saved: Path
) -> None:
    losses: dict[tuple[str, str], dict[str, Any]] = {}
    for who, precision in TAUGHT.items():
        for name, layout in {"one": {}, **(LAYOUTS if who != "neither" else {})}.items():
            changes = {**BATCH, "student__model": SHAPE, "student__layout": layout, "teacher__micro_batch": 8}
            changes |= {"train__steps": 1, "train__eval_batches": 1, "precision": {"engine": "transformer_engine"}}
            config = runs.distill_config(fixtures, tmp_path / f"{who}_{name}", saved, **{**changes, **precision})
            ranks = run(fresh_pool, "distill", config, world=2 if layout else 1)
            step, evaluation = runs.metrics(Path(config["run_dir"]))
            losses[who, name] = {**step, **evaluation}
            in_fp8 = sum(count for rank in ranks for gemm, count in rank.value.items() if "e4m3" in gemm)
            assert in_fp8 == len(ranks) // layout.get("pipeline", 1) * PRODUCTS[who], (who, name)
    for who, name in losses:
        found, one = losses[who, name], losses[who, "one"]
        # After an update a cast that flipped in a gradient is in the weights, as in every later step above.
        parts = {"step": 1e-4, "evaluation": 2e-3} if name == "tensor" else {"step": 1e-6, "evaluation": 1e-6}
        for part, tolerance in parts.items():
            keys = [key for key in one if key.startswith(("valid_", "bits_")) == (part == "evaluation")]
            of_part = ({key: entry[key] for key in keys} | {"step": entry["step"]} for entry in (found, one))
            assert_close(*of_part, tolerance, f"{who} {name}")
    plain, student, teacher = (losses[who, "one"] for who in TAUGHT)
    assert teacher["cross_entropy"] == plain["cross_entropy"] != student["cross_entropy"]
    for found in (student, teacher):
        assert 1e-6 < abs(found["divergence"] / plain["divergence"] - 1) < 5e-2


# Of FP8: the student's three passes of two micro-batches, and the evaluation's two; the teacher's forward passes.
PRODUCTS = {"neither": 0, "student": 4 * 2 * (3 * 2 + 2), "teacher": 4 * 2 * 2}
