"""Hidden-state matching: steps against a plain float64 LLaMA in every layout, checkpoints, resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_capgap.config.schema import LayerPair, Layout, ModelShape, Precision
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.devices import choose
from megatron_capgap.distillation.hidden_state_hooks import HiddenStateMatching
from megatron_capgap.distillation.transfer import TeacherStates
from megatron_capgap.distributed import parallel_context
from megatron_capgap.models import gpt, projections
from megatron_capgap.models.sharded_state import initialise
from tests.support import dense, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

# On two pipeline ranks with two virtual stages each, the student's layers lie on ranks 0 1 0 1; the teacher's, which
# has no virtual stages, on 0 0 1 1.
PAIRS = [
    {"student_layer": 1, "teacher_layer": 2, "weight": 0.5},
    {"student_layer": 4, "teacher_layer": 3, "kind": "cosine", "weight": 2.0},
    {"student_layer": 4, "teacher_layer": 3},
]
# What a pipeline stage sends on is freed behind it.
AT_THE_END_OF_A_STAGE = [{"student_layer": 2, "teacher_layer": 1, "kind": "mse", "weight": 0.25}]
# On two pipeline ranks or more, each pair from the teacher's first stage to the student's last or the other way round;
# one layer of the teacher's is needed twice.
ACROSS_STAGES = [
    {"student_layer": 4, "teacher_layer": 1},
    {"student_layer": 1, "teacher_layer": 4, "kind": "cosine"},
    {"student_layer": 2, "teacher_layer": 1, "weight": 0.25},
]
TP2_PP2 = {"tensor": 2, "pipeline": 2, "sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_rank": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {}),
    "tp2_pp2_sp": (4, TP2_PP2),
}
AS_WIDE = {**runs.STUDENT, "hidden": runs.TEACHER["hidden"]}


def configuration(
    fixtures: Fixtures, run_dir: Path, teacher: Path, pairs: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """Three steps at a constant rate; under an epsilon of 1e-4 Adam's first updates are signs, which float32 does not
    always know."""
    fixed = {"train__steps": 3, "optimizer__schedule": "constant", "optimizer__epsilon": 1.0e-4}
    fixed |= {"optimizer__clip_norm": 0.5, "objective__matching": pairs}
    return runs.distill_config(fixtures, run_dir, teacher, **{**fixed, **changes})


Dense = Callable[[dict[str, Any]], list[dict[str, float]]]


@pytest.fixture(scope="module")
def dense_steps(pool: WorkerPool) -> Dense:
    """The steps of a run that has been made, dense; computed once for all layouts of a model and its pairs."""
    done: dict[str, list[dict[str, float]]] = {}

    def steps(raw: dict[str, Any]) -> list[dict[str, float]]:
        key = json.dumps([raw["student"]["model"], raw["objective"]])
        if key not in done:
            done[key] = dense.steps(pool, "distill", raw)
        return done[key]

    return steps


def assert_steps(run_dir: Path, expected: list[dict[str, float]]) -> None:
    for mine, theirs in zip(runs.steps_of(run_dir), expected, strict=True):
        del mine["lr"]
        runs.assert_close(mine, theirs, 1e-5, run_dir.name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_agree_with_a_plain_llama(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, dense_steps: Dense, name: str
) -> None:
    world, cut = LAYOUTS[name]
    raw = configuration(fixtures, tmp_path / name, teacher, PAIRS, student__layout=cut)
    run_dir = runs.train(pool, "distill", raw, world)
    expected = dense_steps(raw)
    assert_steps(run_dir, expected)
    assert expected[0]["matching"] > expected[-1]["matching"] > 0


@pytest.mark.parametrize(
    "name, of_teacher, pairs",
    [
        ("pp2", {"tensor": 2}, PAIRS),
        ("pp2_vp2", {"pipeline": 2}, ACROSS_STAGES),
        ("tp2_pp2_sp", {"pipeline": 4}, ACROSS_STAGES),
        ("tp2_pp2_sp", {}, PAIRS),
    ],
)
def test_states_travel_to_the_stage_that_matches_them(
    pool: WorkerPool,
    fixtures: Fixtures,
    teacher: Path,
    tmp_path: Path,
    dense_steps: Dense,
    name: str,
    of_teacher: dict[str, Any],
    pairs: list[dict[str, Any]],
) -> None:
    world, cut = LAYOUTS[name]
    changes = {"student__layout": cut, "teacher__layout": of_teacher, "teacher__micro_batch": 1, "data__valid": None}
    raw = configuration(fixtures, tmp_path / name, teacher, pairs, **changes)
    run_dir = runs.train(pool, "distill", raw, world)
    assert_steps(run_dir, dense_steps(raw))


@pytest.mark.parametrize("name", ["tp2_sp", "pp2"])
@pytest.mark.parametrize("model", [runs.STUDENT, AS_WIDE], ids=["projected", "as_wide"])
def test_the_last_layer_of_a_stage_and_equal_widths(
    pool: WorkerPool,
    fixtures: Fixtures,
    teacher: Path,
    tmp_path: Path,
    dense_steps: Dense,
    name: str,
    model: dict[str, int],
) -> None:
    world, cut = LAYOUTS[name]
    changes = {"student__layout": cut, "student__model": model, "data__valid": None}
    raw = configuration(fixtures, tmp_path / name, teacher, AT_THE_END_OF_A_STAGE, **changes)
    assert_steps(runs.train(pool, "distill", raw, world), dense_steps(raw))


def masked_pass(cut: Layout) -> tuple[float, torch.Tensor]:
    """Runs in a worker: sum of the matching losses of two micro-batches with masks, and the projection's gradient."""
    shape, make = ModelShape(**runs.STUDENT), torch.Generator().manual_seed(3)
    device = choose("cpu", 0)
    parallel = parallel_context.build(cut, 0)
    chunks = gpt.build(shape, parallel, Precision(), device, sequence_length=8)
    pair = LayerPair(student_layer=2, teacher_layer=1)
    projections.add(chunks, [pair], 10)
    initialise(chunks, shape, parallel, seed=1)
    matching = HiddenStateMatching(chunks, parallel, [pair])
    batches, taught = [], {}
    for ids in ([0, 1, 2], [3, 4, 5]):
        tokens, mask = torch.randint(301, (3, 8), generator=make), (torch.rand(3, 8, generator=make) < 0.6).float()
        batches.append(MicroBatch(tokens, tokens, mask, torch.arange(8).expand(3, -1), ids))
        states = torch.randn(8, 3, 10, generator=make)
        mine = states.chunk(cut.tensor)[parallel.tp_rank] if cut.sequence else states
        taught.update(zip(ids, mine.unbind(1), strict=True))
    matching.start_batch(batches, TeacherStates({1: taught}))
    for batch in batches:
        (0 * chunks[0](batch.tokens, batch.position_ids, attention_mask=None)).sum().backward()
    return matching.loss().loss_sum.item(), chunks[0].projections[pair.name].weight.grad


def test_masks_are_cut_as_the_sequence_is(pool: WorkerPool) -> None:
    ((loss, gradient),) = pool.run(masked_pass, Layout(), world=1)
    assert loss > 0
    whole = pool.run(masked_pass, Layout(tensor=2), world=2)
    parts = pool.run(masked_pass, Layout(tensor=2, sequence=True), world=2)
    assert [found for found, _ in whole + parts] == pytest.approx([loss] * 4, rel=1e-5)
    for found in (whole[0][1], whole[1][1], parts[0][1] + parts[1][1]):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_resuming_is_exact_and_any_layout_goes_on(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": 4, "checkpoint__every": 2, "student__layout": TP2_PP2, "train__dropout": 0.1}
    whole = runs.train(pool, "distill", configuration(fixtures, tmp_path / "whole", teacher, PAIRS, **changes), 4)
    again = runs.rewind(whole, tmp_path / "again", step=2)
    runs.train(pool, "distill", configuration(fixtures, again, teacher, PAIRS, **changes), 4)
    assert runs.metrics(again) == runs.metrics(whole)
    del changes["train__dropout"]
    one = {**changes, "student__layout": {}}
    expected = runs.train(pool, "distill", configuration(fixtures, tmp_path / "one", teacher, PAIRS, **one))
    other = runs.rewind(expected, tmp_path / "other", step=2)
    runs.train(pool, "distill", configuration(fixtures, other, teacher, PAIRS, **changes), 4)
    for mine, theirs in zip(runs.metrics(other), runs.metrics(expected), strict=True):
        runs.assert_close(mine, theirs, 1e-5)


def test_a_checkpoint_is_a_model_without_projections(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """It is measured, taught from and trained on without them; a run with them starts from a checkpoint without."""
    raw = configuration(fixtures, tmp_path / "run", teacher, PAIRS, student__layout={"pipeline": 2})
    run_dir = runs.train(pool, "distill", raw, 2)
    changes = {"student__model": None, "student__checkpoint": str(run_dir), "train__eval_batches": 2}
    runs.train(pool, "evaluate", runs.adapt_config(fixtures, tmp_path / "evaluate", **changes))
    (measured,) = runs.metrics(tmp_path / "evaluate")
    last = next(entry for entry in runs.metrics(run_dir) if "valid_loss" in entry)
    runs.assert_close(measured, last, 1e-5)
    runs.train(pool, "distill", runs.distill_config(fixtures, tmp_path / "taught", run_dir, train__steps=1))
    changes["student__checkpoint"] = str(runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "adapt")))
    started = configuration(fixtures, tmp_path / "started", teacher, PAIRS, **changes)
    first = runs.steps_of(runs.train(pool, "distill", started))[0]
    assert first["matching"] > 0


def test_a_run_is_not_continued_with_other_projections(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    raw = configuration(fixtures, tmp_path / "run", teacher, PAIRS, train__steps=1)
    before = runs.files_of(runs.train(pool, "distill", raw))
    (rank,) = runs.run_stage(pool, "distill", runs.changed(raw, objective__matching=PAIRS[:1], train__steps=2))
    assert rank.value == 2
    (line,) = rank.stderr.splitlines()
    assert (
        "objective.matching: " in line
        and "was started with 1_2_mse x 0.5, 4_3_cosine x 2, 4_3_mse x 1, this start has" in line
    )
    assert runs.files_of(tmp_path / "run") == before
