"""Whole runs on a GPU, under NCCL and real Transformer Engine; what the CPU says is the reference."""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.validation import fp8
from tests.support import runs
from tests.support.processes import job
from tests.support.runs import Fixtures

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
CAPABILITY = torch.cuda.get_device_capability() if GPUS else (0, 0)
ENGINE = importlib.util.find_spec("transformer_engine") is not None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="no CUDA GPU is visible"),
]
with_engine = pytest.mark.skipif(not ENGINE, reason="Transformer Engine is not installed")
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, {GPUS} visible")

# Sides of every linear's weight are multiples of 128, as all FP8 recipes want them.
SHAPE = {"layers": 4, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": runs.VOCAB}


def config(fixtures: Fixtures, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Four steps of next-token training on the GPU."""
    common = {"device": "cuda", "student__model": SHAPE, "data__sequence_length": 128, "optimizer__lr": 1.0e-3}
    return runs.adapt_config(fixtures, run_dir, **{**common, **changes})


def run(stage: str, settings: dict[str, Any], world: int = 1) -> list[dict[str, Any]]:
    """As `runs.train_apart`, with time for a GPU's libraries to load."""
    return runs.train_apart(stage, settings, world, limit=300)


def recipe(name: str) -> Any:
    """A parameter that is skipped where the GPU lacks the kernels."""
    reason = f"{name} needs compute capability {fp8.generations(name)}, this is {CAPABILITY}"
    return pytest.param(name, marks=pytest.mark.skipif(not fp8.runs_on(name, CAPABILITY), reason=reason))


def assert_near(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    """Losses and gradient norms agree step by step."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=tolerance), (one, other)


@pytest.fixture(scope="module")
def on_the_cpu(fixtures: Fixtures) -> list[dict[str, Any]]:
    """The same run in fp32 on the CPU."""
    return run("adapt", config(fixtures, fixtures.folder / "gpu" / "cpu", device="cpu"))


@pytest.mark.parametrize(
    "engine, compute, tolerance",
    [
        pytest.param("local", "fp32", 1e-3, id="local fp32"),
        pytest.param("local", "bf16", 2e-2, id="local bf16"),
        pytest.param("transformer_engine", "fp32", 1e-3, id="engine fp32", marks=with_engine),
        pytest.param("transformer_engine", "bf16", 2e-2, id="engine bf16", marks=with_engine),
    ],
)
def test_a_gpu_trains_as_the_cpu_does(
    engine: str, compute: str, tolerance: float, fixtures: Fixtures, tmp_path: Path, on_the_cpu: list[dict[str, Any]]
) -> None:
    settings = config(fixtures, tmp_path / "run", precision={"engine": engine, "compute": compute})
    assert_near(run("adapt", settings), on_the_cpu, tolerance)


@with_engine
@pytest.mark.parametrize("name", [recipe(name) for name in fp8.CAPABILITY])
def test_fp8_trains_near_bf16(name: str, fixtures: Fixtures, tmp_path: Path, on_the_cpu: list[dict[str, Any]]) -> None:
    settings = config(fixtures, tmp_path / "run", precision={"compute": "bf16", "fp8": {"recipe": name}})
    steps = run("adapt", settings)
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in on_the_cpu], rel=2e-2)
    assert steps[0]["loss"] != on_the_cpu[0]["loss"]


@with_engine
@pytest.mark.parametrize("name", [recipe("delayed"), recipe("tensorwise")])
def test_an_fp8_run_goes_on_to_the_last_digit(name: str, fixtures: Fixtures, tmp_path: Path) -> None:
    precision = {"compute": "bf16", "fp8": {"recipe": name}}
    changes = {"precision": precision, "train__steps": 6, "checkpoint__every": 3, "checkpoint__keep": 3}
    whole = config(fixtures, tmp_path / "whole", **changes)
    unbroken = run("adapt", whole)
    runs.rewind(tmp_path / "whole", tmp_path / "resumed", 3)
    resumed = run("adapt", {**whole, "run_dir": str(tmp_path / "resumed")})
    assert resumed == unbroken


@with_engine
@pytest.mark.parametrize("name", [recipe("delayed"), recipe("tensorwise"), recipe("blockwise")])
def test_weights_in_fp8_learn_as_weights_in_bf16_do(name: str, fixtures: Fixtures, tmp_path: Path) -> None:
    # As on the CPU (tests/end_to_end/test_fp8_weights.py).
    changes = {"optimizer__clip_norm": 0.0, "train__steps": 6, "checkpoint__every": 3, "checkpoint__keep": 3}
    settings = {
        held: config(
            fixtures,
            tmp_path / str(held),
            precision={"compute": "bf16", "fp8": {"recipe": name, "param_gather": held}},
            **changes,
        )
        for held in (False, True)
    }
    plain, held = (run("adapt", settings[held]) for held in (False, True))
    assert [step["loss"] for step in held] == pytest.approx([step["loss"] for step in plain], rel=1e-4)
    runs.rewind(tmp_path / "True", tmp_path / "resumed", 3)
    assert run("adapt", {**settings[True], "run_dir": str(tmp_path / "resumed")}) == held


WIDE = {"layers": 4, "hidden": 2048, "heads": 16, "kv_heads": 8, "ffn": 5632, "vocab": runs.VOCAB}


@with_engine
@pytest.mark.parametrize(
    "fp8",
    [
        pytest.param(None, id="bf16"),
        pytest.param({"recipe": "tensorwise"}, id="tensorwise"),
        pytest.param({"recipe": "delayed", "param_gather": True}, id="delayed, weights too"),
    ],
)
def test_the_memory_estimate_is_within_15_percent(fp8: Any, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"student__model": WIDE, "data__sequence_length": 1024, "data__valid": None}
    changes |= {"train__steps": 3, "train__global_batch": 8, "train__micro_batch": 8}
    settings = config(fixtures, tmp_path / "run", precision={"compute": "bf16", "fp8": fp8}, **changes)
    with job(["adapt", "--config", runs.write_config(settings)], 1, tmp_path / "output", cold=True) as ranks:
        assert ranks.wait(300) == [0], ranks.stderr()
        numbers = re.findall(r"fullest rank (\d+) MiB above start-up, estimated (\d+) MiB", ranks.stdout())
    ((measured, estimated),) = ((int(one), int(other)) for one, other in numbers)
    assert 0.85 < estimated / measured < 1.15, (estimated, measured)


@with_engine
def test_a_teacher_in_fp8_teaches_a_student_in_bf16(fixtures: Fixtures, tmp_path: Path) -> None:
    run("adapt", config(fixtures, tmp_path / "teacher", precision={"compute": "bf16"}))
    changes = {"student__model": SHAPE, "data__sequence_length": 128, "device": "cuda", "optimizer__lr": 1.0e-3}
    precisions = {
        "bf16": {"compute": "bf16"},
        "fp8": {"compute": "bf16", "fp8": {"recipe": "tensorwise"}},
        "held": {"compute": "bf16", "fp8": {"recipe": "tensorwise", "param_gather": True}},
    }
    steps = {}
    for name, precision in precisions.items():
        settings = runs.distill_config(fixtures, tmp_path / name, tmp_path / "teacher", **changes)
        settings["precision"] = {"compute": "bf16"}
        settings["teacher"]["precision"] = precision
        steps[name] = run("distill", settings)
    assert [s["loss"] for s in steps["fp8"]] == pytest.approx([s["loss"] for s in steps["bf16"]], rel=2e-2)
    assert steps["held"] == steps["fp8"]
    assert steps["fp8"][0]["divergence"] != steps["bf16"][0]["divergence"]
    assert steps["fp8"][0]["cross_entropy"] == steps["bf16"][0]["cross_entropy"]


@two_gpus
@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {}])
def test_layouts_agree_under_nccl(
    layout: dict[str, Any], fixtures: Fixtures, tmp_path: Path, on_the_cpu: list[dict[str, Any]]
) -> None:
    settings = config(fixtures, tmp_path / "run", student__layout=layout, precision={"engine": "local"})
    assert_near(run("adapt", settings, world=2), on_the_cpu, 1e-3)


# As on the CPU (tests/end_to_end/test_fp8.py), but for the GEMMs, whose accumulators are narrower on GPUs.
@two_gpus
@with_engine
@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2}])
@pytest.mark.parametrize("name", [recipe(name) for name in fp8.CAPABILITY])
def test_fp8_layouts_agree_under_nccl(name: str, layout: dict[str, Any], fixtures: Fixtures, tmp_path: Path) -> None:
    steps = [
        run(
            "adapt",
            config(
                fixtures,
                tmp_path / str(world),
                student__layout=layout if world > 1 else {},
                precision={"compute": "bf16", "fp8": {"recipe": name}},
            ),
            world,
        )
        for world in (1, 2)
    ]
    assert_near(*steps, 2e-2)


def test_a_checkpoint_of_the_gpu_loads_on_the_cpu(fixtures: Fixtures, tmp_path: Path) -> None:
    settings = config(fixtures, tmp_path / "run", precision={"engine": "local"})
    run("adapt", settings)
    losses = []
    for device in ("cuda", "cpu"):
        evaluation = {"run_dir": str(tmp_path / device), "device": device, "data": settings["data"]}
        evaluation |= {"student": {"checkpoint": settings["run_dir"]}, "precision": {"engine": "local"}}
        run("evaluate", evaluation)
        losses.append(runs.metrics(tmp_path / device)[-1]["valid_loss"])
    assert math.isclose(*losses, rel_tol=1e-3)


@with_engine
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_engine_builds_every_family(family: str, fixtures: Fixtures, tmp_path: Path) -> None:
    grouped = {"kv_heads": 2} if ARCHITECTURES[family].grouped_queries else {}
    shape = {"family": family, "layers": 2, "hidden": 128, "heads": 4, "ffn": 256, "vocab": runs.VOCAB} | grouped
    steps = [
        run(
            "adapt",
            config(
                fixtures,
                tmp_path / engine,
                student__model={**shape, "max_positions": 128},
                precision={"engine": engine},
            ),
        )
        for engine in ("local", "transformer_engine")
    ]
    assert_near(*steps, 1e-3)
