"""The same run in every layout: losses, gradient norms and the held-out loss of four steps agree with one rank's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

TOLERANCE = 1e-5

# name: (ranks, layout)
LAYOUTS = {
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp3_uneven": (3, {"pipeline": 3, "stage_layers": [1, 2, 1]}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"context": 2}),
    "cp2_tp2_sp": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "cp4": (4, {"context": 4}),
    "cp2_pp2_vp2": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "cp2_tp2_pp2_sp": (8, {"context": 2, "tensor": 2, "pipeline": 2, "sequence": True}),
}
WITH_TIED_EMBEDDINGS = ("pp2", "tp2_pp2_sp")
CASES = [(stage, name, False) for stage in ("adapt", "distill") for name in LAYOUTS]
CASES += [(stage, name, True) for stage in ("adapt", "distill") for name in WITH_TIED_EMBEDDINGS]

Run = Callable[[str, bool, int, dict[str, Any]], Path]


@pytest.fixture(scope="module")
def run(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains a student; a run that was asked for before is not made again."""
    done: dict[str, Path] = {}

    def run(stage: str, tied: bool, world: int, layout: dict[str, Any]) -> Path:
        key = f"{stage} {tied} {world} {layout}"
        if key not in done:
            changes = {"student__layout": layout, "student__model__tied_embeddings": tied}
            if stage == "distill" and "stage_layers" in layout:  # the teacher has as many layers
                changes["teacher__layout"] = layout
            folder = tmp_path_factory.mktemp(stage) / "run"
            if stage == "adapt":
                config = runs.adapt_config(fixtures, folder, **changes)
            else:
                config = runs.distill_config(fixtures, folder, teacher, **changes)
            done[key] = runs.train(pool, stage, config, world)
        return done[key]

    return run


@pytest.mark.parametrize("stage, name, tied", CASES, ids=[f"{s}-{n}{'-tied' if t else ''}" for s, n, t in CASES])
def test_every_layout_gives_the_losses_of_one_rank(run: Run, stage: str, name: str, tied: bool) -> None:
    world, layout = LAYOUTS[name]
    expected = runs.metrics(run(stage, tied, 1, {}))
    found = runs.metrics(run(stage, tied, world, layout))
    assert [entry["step"] for entry in found] == [1, 2, 3, 4, 4]
    assert ("divergence" in found[0]) == (stage == "distill")
    for mine, theirs in zip(found, expected, strict=True):
        runs.assert_close(mine, theirs, TOLERANCE, name)
    assert found[0]["loss"] > found[3]["loss"], "four steps that learn nothing would agree in any layout"


def test_a_divergence_without_a_chain_rule(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    found = []
    for name, (world, layout) in (("one", (1, {})), ("tp2_sp", LAYOUTS["tp2_sp"])):
        changes = {"objective__divergence": "jsd", "student__layout": layout, "train__steps": 2, "data__valid": None}
        config = runs.distill_config(fixtures, tmp_path / name, teacher, **changes)
        found.append(runs.metrics(runs.train(pool, "distill", config, world)))
    for mine, theirs in zip(*found, strict=True):
        runs.assert_close(mine, theirs, TOLERANCE)
    assert 0 < found[0][0]["divergence"] < 0.7 * 4, "jsd is at most log 2, times the temperature squared"


@pytest.mark.parametrize("stage", ["adapt", "distill"])
def test_tied_embeddings_are_another_model(run: Run, stage: str) -> None:
    tied, untied = (runs.metrics(run(stage, tied, 1, {}))[0] for tied in (True, False))
    assert abs(tied["grad_norm"] - untied["grad_norm"]) > 1e-3 * untied["grad_norm"]


def test_evaluate_counts_every_held_out_token_once(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """The last pass over the held-out set is not full, and where its rows of padding lie depends on the layout."""
    found = []
    cases = [("even", 1, 8, {}), ("odd", 1, 12, {}), ("dp2", 2, 12, {}), ("tp2_pp2", 4, 12, LAYOUTS["tp2_pp2_sp"][1])]
    for name, world, global_batch, layout in cases:
        changes = {"student__model": None, "train__eval_batches": None, "train__global_batch": global_batch}
        changes |= {"student__checkpoint": str(teacher), "student__layout": layout}
        run_dir = runs.train(pool, "evaluate", runs.adapt_config(fixtures, tmp_path / name, **changes), world)
        found.append(json.loads((run_dir / "evaluation.json").read_text()))
    samples = found[0]["samples"]
    assert samples % 8 == 0 and samples % 12 != 0
    for entry in found:
        assert (entry["samples"], entry["tokens"], entry["step"]) == (samples, 32 * samples, 25)
        numbers = ("step", "valid_loss", "valid_perplexity", "bits_per_byte")
        runs.assert_close({n: entry[n] for n in numbers}, {n: found[0][n] for n in numbers}, TOLERANCE)
