"""Finetuning on packed conversations: equal to each conversation by itself in float64, and the same in every layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import plain_chat, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

TOLERANCE = 1e-5
# name: (ranks, layout)
LAYOUTS = {
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "dp2": (2, {}),
}
NOISE = {"finetune__neftune_alpha": 5.0}
# name: (with a teacher, changes)
KINDS = {"plain": (False, {}), "noise": (False, NOISE), "taught": (True, {}), "taught_noise": (True, NOISE)}
CASES = [(kind, name) for kind in ("plain", "noise") for name in LAYOUTS]
CASES += [(kind, name) for kind in ("taught", "taught_noise") for name in ("tp2_sp", "pp2", "tp2_pp2_sp", "dp2")]

Run = Callable[[str, int, dict[str, Any]], Path]


@pytest.fixture(scope="module")
def configure(fixtures: Fixtures, student: Path, teacher: Path) -> Callable[..., dict[str, Any]]:
    """A configuration of one of `KINDS`."""

    def configure(kind: str, run_dir: Path, **changes: Any) -> dict[str, Any]:
        with_teacher, more = KINDS[kind]
        config = runs.finetune_config(fixtures, run_dir, student, **{**more, **changes})
        return runs.taught(config, teacher) if with_teacher else config

    return configure


@pytest.fixture(scope="module")
def run(pool: WorkerPool, configure: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Finetunes; a run that was asked for before is not made again."""
    done: dict[str, Path] = {}

    def run(kind: str, world: int, layout: dict[str, Any]) -> Path:
        key = f"{kind} {world} {layout}"
        if key not in done:
            config = configure(kind, tmp_path_factory.mktemp(kind) / "run", student__layout=layout)
            done[key] = runs.train(pool, "finetune", config, world)
        return done[key]

    return run


@pytest.mark.parametrize("kind, name", CASES, ids=[f"{kind}-{name}" for kind, name in CASES])
def test_every_layout_gives_the_losses_of_one_rank(run: Run, kind: str, name: str) -> None:
    world, layout = LAYOUTS[name]
    expected = runs.metrics(run(kind, 1, {}))
    found = runs.metrics(run(kind, world, layout))
    assert [entry["step"] for entry in found] == [1, 2, 3, 3]
    assert ("divergence" in found[0]) == KINDS[kind][0]
    for mine, theirs in zip(found, expected, strict=True):
        runs.assert_close(mine, theirs, TOLERANCE, name)
    assert found[0]["loss"] > found[2]["loss"], "steps that learn nothing would agree in any layout"


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_agree_with_a_plain_llama_on_each_conversation_alone(
    pool: WorkerPool, student: Path, configure: Callable[..., dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    # Under 1e-4 Adam's first updates are the signs of gradients, and float32 does not know all of them.
    changes = {"optimizer__schedule": "constant", "optimizer__clip_norm": 0.5, "optimizer__epsilon": 1.0e-4}
    changes["student__layout"] = {"tensor": 2, "sequence": True}
    raw = configure(kind, tmp_path / "run", **changes)
    found = runs.steps_of(runs.train(pool, "finetune", raw, world=2))
    expected = plain_chat.steps(pool, raw, student)
    assert len(found) == 3
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.pop("lr") == raw["optimizer"]["lr"]
        runs.assert_close(mine, theirs, TOLERANCE, kind)


def test_noise_changes_the_training_loss_alone(run: Run) -> None:
    """Held-out losses are those of the model as it is: before the first update both runs have one model."""
    plain, noisy = (runs.metrics(run(kind, 1, {})) for kind in ("plain", "noise"))
    assert abs(plain[0]["loss"] - noisy[0]["loss"]) > 1e-4
    assert plain[0]["tokens"] == noisy[0]["tokens"]


@pytest.mark.parametrize("name", ["one", "tp2_sp", "pp2"])
@pytest.mark.parametrize("kind", ["plain", "taught"])
def test_rows_of_their_own_have_the_same_loss_and_gradient(
    pool: WorkerPool, configure: Callable[..., dict[str, Any]], tmp_path: Path, kind: str, name: str
) -> None:
    """One step over everything: 24 conversations, each in a row, or together in as many rows as they need."""
    world, layout = LAYOUTS.get(name, (1, {}))
    found, rows = [], {}
    for packed in (True, False):
        common = {"student__layout": layout, "finetune__packed": packed, "data__valid": None, "train__steps": 1}
        raw = configure(kind, tmp_path / str(packed), **common)
        if packed:
            pass_over_all = _rows_of(pool, raw)
        rows[packed] = pass_over_all if packed else 24
        size = {"train__global_batch": rows[packed], "train__micro_batch": 1}
        raw = runs.changed(raw, **size, **({"teacher__micro_batch": 1} if kind == "taught" else {}))
        found.append(runs.steps_of(runs.train(pool, "finetune", raw, world))[0])
    assert rows[True] < 14, "what is alone in its row shows nothing"
    runs.assert_close(found[0], found[1], TOLERANCE, name)


def _rows_of(pool: WorkerPool, raw: dict[str, Any]) -> int:
    """How many rows the conversations take, as a run of one step finds them."""
    from megatron_capgap.config.loader import load

    probe = runs.changed(raw, run_dir=f"{raw['run_dir']}_probe", train__global_batch=1, train__micro_batch=1)
    probe = {name: section for name, section in probe.items() if name not in ("teacher", "objective")}
    probe["student"]["layout"] = {}
    runs.train(pool, "finetune", probe)
    return len(plain_chat.rows_of(load(runs.write_config(probe), [], "finetune").config))
