"""Every family trains and distils in every layout as a plain float64 model of transformers does."""

from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.config.loader import load
from tests.support import hf_models, plain_steps, pruning, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

LAYOUTS = {
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
}
NAMES = ("llama3", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")


def imported(pool: WorkerPool, fixtures: Fixtures, name: str, seed: int, folder: Path) -> Path:
    """The run directory of a random model that speaks the material's tokenizer."""
    return pruning.imported(pool, fixtures, hf_models.build(name, seed), folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_distilling_agrees_with_plain_models(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, name: str, layout: str
) -> None:
    """Student and teacher are of the family; three steps, the gradient norms of which see every parameter."""
    student, teacher = (imported(pool, fixtures, name, seed, tmp_path / str(seed)) for seed in (0, 1))
    world, cut = LAYOUTS[layout]
    changes: dict[str, Any] = {"student__model": None, "student__checkpoint": str(student), "student__layout": cut}
    changes |= {"optimizer__schedule": "constant", "optimizer__epsilon": 1.0e-4, "optimizer__clip_norm": 0.5}
    changes |= {"train__steps": 3, "data__valid": None}
    raw = runs.distill_config(fixtures, tmp_path / "run", teacher, **changes)
    found = runs.steps_of(runs.train(pool, "distill", raw, world))
    config = load(runs.write_config(raw), [], "distill").config
    plain = [hf_models.build(name, seed).double() for seed in (0, 1)]
    for mine, theirs in zip(found, plain_steps.steps(pool, config, *plain), strict=True):
        assert mine.pop("lr") == config.optimizer.lr
        runs.assert_close(mine, theirs, 2e-5, f"{name} {layout}")


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_random_weights_are_the_same_in_every_layout(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, name: str
) -> None:
    model = {"family": name, "layers": 4, "hidden": 32, "heads": 4, "ffn": 48, "vocab": runs.VOCAB, "max_positions": 40}
    expected = None
    for layout, (world, cut) in {"one": (1, {}), **LAYOUTS}.items():
        changes = {"student__model": model, "student__layout": cut, "train__steps": 2}
        run_dir = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / layout, **changes), world)
        found = runs.metrics(run_dir)
        expected = expected or found
        for mine, theirs in zip(found, expected, strict=True):
            runs.assert_close(mine, theirs, 1e-5, layout)
