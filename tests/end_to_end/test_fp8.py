"""Whole runs of Transformer Engine's layers, on the CPU over emulated kernels: engines, layouts, FP8, resume."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.runs import Material, assert_close

SHAPE = {"layers": 4, "hidden": 128, "heads": 8, "kv_heads": 4, "ffn": 256, "vocab": runs.VOCAB}
ENGINE = {"engine": "transformer_engine"}
LAYOUTS = {
    "tensor 2 with sequence": {"tensor": 2, "sequence": True},
    "pipeline 2": {"pipeline": 2},
}


def adapt(material: Material, run_dir: Path, world: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """Four steps of next-token training."""
    return runs.train_apart("adapt", runs.adapt_config(material, run_dir, student__model=SHAPE, **changes), world)


@pytest.fixture(scope="module")
def local(material: Material) -> list[dict[str, Any]]:
    """The run with Megatron's local layers."""
    return adapt(material, material.folder / "fp8" / "local")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_without_fp8_the_engine_changes_nothing(
    name: str, material: Material, tmp_path: Path, local: list[dict[str, Any]]
) -> None:
    steps = adapt(material, tmp_path / "run", 2, precision=ENGINE, student__layout=LAYOUTS[name])
    for found, expected in zip(steps, local, strict=True):
        assert_close(found, expected, 1e-5, name)


@pytest.mark.slow
def test_delayed_scaling_in_other_layouts(material: Material, tmp_path: Path, local: list[dict[str, Any]]) -> None:
    precision = {"fp8": {"recipe": "delayed"}}
    whole = adapt(material, tmp_path / "whole", precision=precision)
    pipeline = adapt(material, tmp_path / "pipeline", 2, precision=precision, student__layout={"pipeline": 2})
    tensor = adapt(
        material, tmp_path / "tensor", 2, precision=precision, student__layout=LAYOUTS["tensor 2 with sequence"]
    )
    for index, step in enumerate(whole):
        # The same casts of the same tensors: a pipeline only moves them.
        assert_close(pipeline[index], step, 1e-5, "pipeline")
        # Sums over ranks round differently, and a cast makes a whole unit of its last place out of it.
        assert_close(tensor[index], step, 2e-2, "tensor")
        assert 1e-5 < abs(step["loss"] / local[index]["loss"] - 1) < 1e-2
    assert tensor[0]["loss"] == pytest.approx(whole[0]["loss"], rel=2e-5)


@pytest.mark.slow
def test_delayed_scales_are_resumed(material: Material, tmp_path: Path) -> None:
    changes = {"precision": {"fp8": {"recipe": "delayed"}}, "checkpoint__every": 2, "checkpoint__keep": 3}
    unbroken = adapt(material, tmp_path / "whole", **changes)
    runs.rewind(tmp_path / "whole", tmp_path / "resumed", 2)
    assert adapt(material, tmp_path / "resumed", **changes) == unbroken
    # In another layout, and without FP8.
    for name, other in (("pipeline", {"student__layout": {"pipeline": 2}}), ("local", {"precision": {}})):
        runs.rewind(tmp_path / "whole", tmp_path / name, 2)
        steps = adapt(material, tmp_path / name, 2 if name == "pipeline" else 1, **{**changes, **other})
        assert steps[2]["loss"] == pytest.approx(unbroken[2]["loss"], rel=1e-5 if name == "pipeline" else 1e-2)
        assert steps[2]["loss"] != unbroken[2]["loss"] or name == "pipeline"


@pytest.mark.slow
def test_a_teacher_in_fp8_and_its_start_up_lines(material: Material, tmp_path: Path) -> None:
    adapt(material, tmp_path / "teacher")
    losses = {}
    for recipe in (None, "tensorwise"):
        config = runs.distill_config(material, tmp_path / str(recipe), tmp_path / "teacher", student__model=SHAPE)
        if recipe:
            config["teacher"]["precision"] = {"fp8": {"recipe": recipe}}
        losses[recipe] = runs.train_apart("distill", config)[0]
    said = (tmp_path / "tensorwise_output" / "0.out").read_text()
    assert "student arithmetic: fp32\n" in said
    assert "16 matrix products of a micro-batch in FP8, 1 in fp32" in " ".join(said.split())
    assert losses["tensorwise"]["cross_entropy"] == losses[None]["cross_entropy"]
    assert 0 < abs(losses["tensorwise"]["divergence"] / losses[None]["divergence"] - 1) < 5e-2
