"""The stage prune as a user meets it: --check, wrong input, a signal, and processes of its own."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_capgap.checkpoint import run_directory
from megatron_capgap.cli import main
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import size
from tests.support import engine, pruning, runs
from tests.support.pool import WorkerPool
from tests.support.processes import job
from tests.support.runs import Fixtures

SMALL = {"layers": 2, "hidden": 42, "ffn": 64}


def test_check_tells_the_shape_before_and_after(
    fixtures: Fixtures, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = pruning.prune_config(fixtures, teacher, tmp_path / "run", SMALL, {"tensor": 2, "pipeline": 2})
    assert main(["prune", "--config", runs.write_config(raw), "--check-world", "8"]) == 0
    out = capsys.readouterr().out
    before = ModelShape(**runs.TEACHER)
    after = ModelShape(**{**runs.TEACHER, **SMALL}, head_dim=8)
    for role, shape in (("teacher", before), ("student", after)):
        found = re.search(rf"^{role} +([\d,]+) +([\d,]+)  llama: (.*)$", out, re.MULTILINE)
        assert found is not None
        counts = [int(number.replace(",", "")) for number in found.groups()[:2]]
        assert counts == [size.parameters(shape), size.non_embedding_parameters(shape)]
        assert f"{shape.layers} layers, hidden {shape.hidden}, 6 heads over 2 groups, ffn {shape.ffn}" in found[3]
    assert "rank grid: 8 ranks = tensor 2 x data 2 x pipeline 2" in out
    assert "scores: 2 global batches, 512 tokens, " in out
    assert "student arithmetic" not in out and "teacher arithmetic: fp32" in out
    assert not (tmp_path / "run").exists()


def test_check_tells_what_layers_keep_together(
    fixtures: Fixtures, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they store is known by the scores; the teacher is compared with what is kept."""
    prune = {"hidden": 42, "ffn": 64, "heads": 3, "per_layer": True}
    raw = pruning.prune_config(fixtures, teacher, tmp_path / "run", prune, {"tensor": 2})
    assert main(["prune", "--config", runs.write_config(raw), "--check-world", "2"]) == 0
    out = capsys.readouterr().out
    wide = {**runs.TEACHER, "hidden": 42, "ffn": 64, "head_dim": 8}
    shapes = ModelShape(**{**wide, "heads": 3, "kv_heads": 1}), ModelShape(**wide)
    kept, stored = map(size.non_embedding_parameters, shapes)
    assert f"the student keeps {kept:,} of {stored:,} parameters (non-embedding)" in out
    assert "its layers keep 4 key/value heads and 256 neurons in total" in out
    ratio = size.non_embedding_parameters(ModelShape(**runs.TEACHER)) / kept
    assert f"capacity gap T/S: {ratio:.2f} (non-embedding parameters)" in out


MISTAKES: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "larger": ({"prune__hidden": 96}, 1, ("prune.hidden: 96 is larger than hidden 48 of", "valid values: 1 to 48")),
    "not divisible": (
        {"prune__heads": 3, "student__layout": {"tensor": 2}},
        2,
        ("student.layout.tensor: 2 does not divide prune.heads 3 and prune.kv_heads 1;", "valid values: 1"),
    ),
    "no data": ({"data__train": ["FOLDER/nothing"]}, 2, ("FOLDER/nothing.bin does not exist",)),
    "no checkpoint": ({"teacher__checkpoint": "FOLDER/nobody"}, 1, ("teacher.checkpoint: FOLDER/nobody: no such",)),
    "none can differ": (
        {"prune": {"layers": 2, "per_layer": True}},
        1,
        ("prune.per_layer: true, but every layer keeps all heads and neurons that it can store", "or remove the key"),
    ),
    "a student": ({"student__checkpoint": "FOLDER/x"}, 1, ("student.checkpoint: prune creates the student",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_no_traces(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, name: str) -> None:
    changes, world, says = MISTAKES[name]
    raw = runs.changed(pruning.prune_config(fixtures, teacher, tmp_path / "run", SMALL, {}), **changes)
    raw = json.loads(json.dumps(raw).replace("FOLDER", str(tmp_path)))
    ranks = runs.run_stage(pool, "prune", raw, world)
    assert [rank.value for rank in ranks] == [2] * world
    (line,) = ranks[0].stderr.splitlines()
    assert line.startswith("capgap: error: ")
    for part in says:
        assert part.replace("FOLDER", str(tmp_path)) in line
    assert not (tmp_path / "run").exists()


def test_a_damaged_teacher_leaves_no_checkpoint(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """Scores are there from an earlier start, so that the damage shows while the student is written."""
    mine = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    raw = pruning.prune_config(fixtures, mine, tmp_path / "run", SMALL, {})
    run_dir = runs.train(pool, "prune", raw)
    (run_dir / "latest").unlink()
    shutil.rmtree(run_dir / "checkpoints")
    files = sorted(mine.glob("checkpoints/step_*/*.distcp"))
    whole = [file.read_bytes() for file in files]
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content[: len(content) // 2])
    ranks = runs.run_stage(pool, "prune", raw, 2)
    assert [rank.value for rank in ranks] == [2, 2]
    assert "use another checkpoint" in ranks[0].stderr
    assert run_directory.latest(run_dir) is None
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content)
    assert [rank.value for rank in runs.run_stage(pool, "prune", raw, 2)] == [0, 0]
    assert run_directory.latest(run_dir) is not None


@pytest.mark.slow("scores a teacher once for each kind of score and of layer")
@engine.needs_files
def test_transformer_engine_s_layers_have_the_scores_of_local_ones(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """Their norms live in the linears behind them."""
    for importance in ("gradient", "activation"):
        sums = []
        for name in ("local", "transformer_engine"):
            run_dir = tmp_path / f"{name}_{importance}"
            prune = {**SMALL, "batches": 1, "importance": importance}
            raw = pruning.prune_config(fixtures, teacher, run_dir, prune, {"tensor": 2, "sequence": True})
            raw["precision"] = {"engine": name}
            if name == "local":
                runs.train(pool, "prune", raw, 2)
            else:  # Megatron looks for the engine as it is imported
                with job(
                    ["prune", "--config", runs.write_config(raw)], 2, tmp_path / f"{importance}_output", cold=True
                ) as ranks:
                    assert ranks.wait() == [0, 0], ranks.stderr()
            sums.append(json.loads((run_dir / "scores.json").read_text())["sums"])
        for part in sums[0]:
            theirs, mine = (torch.tensor(one[part], dtype=torch.float64) for one in sums)
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), part


@pytest.mark.slow("a run long enough to be signalled in its middle, twice")
def test_a_signal_keeps_the_scores_and_the_same_command_goes_on(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    raw = pruning.prune_config(fixtures, teacher, tmp_path / "run", {**SMALL, "batches": 30}, {"tensor": 2})
    raw["checkpoint"]["every"] = 1
    words, scores = ["prune", "--config", runs.write_config(raw)], tmp_path / "run" / "scores.json"
    with job(words, 2, tmp_path / "first") as ranks:
        ranks.wait_until(scores.is_file)
        ranks.signal(signal.SIGTERM)
        assert ranks.wait() == [0, 0], ranks.stderr()
        assert "stopped by SIGTERM after batch" in ranks.stdout()
    begun = json.loads(scores.read_text())["batches"]
    assert 0 < begun < 30 and run_directory.latest(tmp_path / "run") is None
    assert [rank.value for rank in runs.run_stage(pool, "prune", raw, 2, ["--checkpoint.every=0"])] == [0, 0]
    assert json.loads(scores.read_text())["batches"] == 30
    assert run_directory.latest(tmp_path / "run") is not None
