"""Scores of heads, neurons, channels and layers: in every layout those of a dense float64 model with masks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support import hf_models, masked, pruning, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

# Grouped queries with a head width of its own, or fewer in the student; tied embeddings; biases of queries alone, or of
# everything; LayerNorm; learned positions; parallel residuals.
SHAPES = {
    "llama": {"layers": 2, "hidden": 36, "ffn": 56},
    "smollm": {"layers": 2, "hidden": 36, "heads": 4, "kv_heads": 2, "ffn": 56},
    "qwen2": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 56},
    "gpt2": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 80},
    "gpt_neox": {"layers": 2, "hidden": 24, "heads": 2, "ffn": 80},
}


@pytest.fixture(scope="module")
def scored(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, kind) to the teacher, and to what the dense model says; made once each."""
    teachers: dict[str, Path] = {}
    expected: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def scored(name: str, kind: str) -> tuple[Path, Callable[[dict[str, Any]], dict[str, torch.Tensor]]]:
        if name not in teachers:
            teachers[name] = pruning.imported(pool, fixtures, hf_models.build(name), tmp_path_factory.mktemp(name))

        def dense(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
            if (name, kind) not in expected:
                score = masked.by_gradients if kind == "gradient" else masked.by_activations
                expected[name, kind] = score(hf_models.build(name).double(), pruning.samples(pool, raw))
            return expected[name, kind]

        return teachers[name], dense

    return scored


LAYOUTS = {**pruning.LAYOUTS, "tp2_pp2_dp2": (8, {"tensor": 2, "pipeline": 2})}
CASES = [(name, "gradient", layout) for name in SHAPES for layout in pruning.LAYOUTS]
CASES += [(name, "activation", layout) for name in SHAPES for layout in ("one", "pp2", "tp2_pp2_sp")]
CASES += [("llama", kind, "tp2_pp2_dp2") for kind in ("gradient", "activation")]
# Norms of queries and keys; a window.
SHAPES |= {
    "qwen3": {"layers": 2, "hidden": 42, "heads": 4, "kv_heads": 2, "ffn": 56},
    "mistral": {"layers": 2, "hidden": 40, "heads": 4, "kv_heads": 2, "ffn": 56},
}
CASES += [
    (name, *how) for name in ("qwen3", "mistral") for how in (("gradient", "tp2_pp2_sp"), ("activation", "tp2_dp2"))
]


@pytest.mark.parametrize("name, kind, layout", CASES, ids=["-".join(case) for case in CASES])
def test_scores_are_those_of_a_dense_model(
    pool: WorkerPool, fixtures: Fixtures, scored: Any, tmp_path: Path, name: str, kind: str, layout: str
) -> None:
    teacher, dense = scored(name, kind)
    world, cut = LAYOUTS[layout]
    raw = pruning.prune_config(fixtures, teacher, tmp_path / "run", {**SHAPES[name], "importance": kind}, cut)
    run_dir = runs.train(pool, "prune", raw, world)
    found = json.loads((run_dir / "scores.json").read_text())
    assert found["batches"] == 2
    for part, theirs in dense(raw).items():
        mine = torch.tensor(found["sums"][part], dtype=torch.float64)
        for ours, wanted in zip(*map(torch.atleast_2d, (mine, theirs)), strict=True):
            error = ((ours / ours.norm() - wanted / wanted.norm()).abs()).max().item()
            assert error <= 1e-5, f"{name} {kind} {layout}: {part} is off by {error:.1e}"
        assert abs(mine.norm() / theirs.norm() - 1) <= 1e-5


def summed_over_tokens(block: int, *factors: torch.Tensor) -> torch.Tensor:
    """Runs in a worker."""
    from megatron_capgap.pruning import importance

    with mock.patch.object(importance, "_BLOCK", block):
        return importance._over_tokens(*factors)


@pytest.mark.parametrize("block", [1, 40, 1 << 17])
def test_sums_over_tokens_by_blocks(pool: WorkerPool, block: int) -> None:
    """A token at a time, a few with a rest, and all at once."""
    one, other = torch.randn(7, 2, 9), torch.randn(7, 2, 9).bfloat16()
    for factors in ((one,), (one, other)):
        (found,) = pool.run(summed_over_tokens, block, *factors, world=1)
        expected = torch.stack([factor.double() for factor in factors]).prod(0).sum((0, 1))
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
