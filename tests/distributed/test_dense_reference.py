"""Steps of the stack against the same steps of a plain float64 LLaMA: loss, its parts, gradient norm, update."""

from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.config.load import load
from megatron_capgap.config.schema import Config, ModelShape
from tests.support import dense, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Material


def dense_steps(pool: WorkerPool, config: Config, teacher: Path | None) -> list[dict[str, float]]:
    """The run that a configuration means, from the initial weights of the stack."""
    shape, seed = config.student.model, config.seed
    assert shape is not None
    student = dense.llama(shape, pool.run(dense.megatron_weights, dense.Source(shape, seed), world=1)[0])
    taught = None
    if teacher is not None:
        source = dense.Source(ModelShape(**runs.TEACHER), seed, teacher)
        taught = dense.llama(source.shape, pool.run(dense.megatron_weights, source, world=1)[0])
    return dense.steps(pool, config, student, taught)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", ["adapt", "distill"])
def test_steps_agree_with_a_plain_llama(
    pool: WorkerPool, material: Material, teacher: Path, tmp_path: Path, stage: str, tied: bool
) -> None:
    changes: dict[str, Any] = {"optimizer__schedule": "constant", "student__model__tied_embeddings": tied}
    changes |= {
        "train__steps": 3,
        "optimizer__clip_norm": 0.5,
        "student__model__rope_theta": 500.0,
        "data__valid": None,
    }
    # Under 1e-4 Adam's first updates are the signs of gradients, and float32 does not know all of them.
    changes |= {"optimizer__epsilon": 1.0e-4, "student__layout": {"tensor": 2, "sequence": True}}
    if stage == "adapt":
        raw = runs.adapt_config(material, tmp_path / "run", **changes)
    else:
        raw = runs.distill_config(material, tmp_path / "run", teacher, **changes)
    found = runs.steps_of(runs.train(pool, stage, raw, world=2))
    config = load(runs.write_config(raw), [], stage).config
    expected = dense_steps(pool, config, teacher if stage == "distill" else None)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.pop("lr") == config.optimizer.lr
        runs.assert_close(mine, theirs, 1e-5, stage)
