"""--check: the numbers of a run without the run; and resolved.yaml, which says what a run really was."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_capgap.cli import main
from megatron_capgap.config.loader import load
from megatron_capgap.config.schema import Layout, ModelShape, Precision
from megatron_capgap.models import size
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import ROOT, cpu_seconds, environment
from tests.support.runs import Fixtures

SEVENTY_BILLION = {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocab": 128256}
ODD_HEADS = {"layers": 2, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 20, "ffn": 80, "vocab": 301}


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs --check in this process, without a launcher; returns its report."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def check(stage: str, config: dict, world: int) -> str:
        assert main([stage, "--config", runs.write_config(config), "--check-world", str(world)]) == 0
        out, err = capsys.readouterr()
        assert err == "" and not Path(config["run_dir"]).exists()
        return out

    return check


def parameter_counts(shape: ModelShape) -> tuple[int, int]:
    """Runs in a worker of its own world: all parameters of the built model, and those outside of the embeddings."""
    from megatron_capgap.devices import choose
    from megatron_capgap.distributed import parallel_context
    from megatron_capgap.models import gpt

    device = choose("cpu", 0)
    (chunk,) = gpt.build(shape, parallel_context.build(Layout(), 0), Precision(), device, sequence_length=8)
    counts = {name: parameter.numel() for name, parameter in chunk.named_parameters()}
    inner = sum(n for name, n in counts.items() if not name.startswith(("embedding.", "output_layer.")))
    return sum(counts.values()), inner


def shard_count(shape: ModelShape, layout_of_ranks: Layout, head: bool) -> int:
    """Runs in a worker: parameters that this rank holds."""
    from megatron_capgap.devices import choose
    from megatron_capgap.distributed import parallel_context
    from megatron_capgap.models import gpt

    device = choose("cpu", 0)
    chunks = gpt.build(
        shape, parallel_context.build(layout_of_ranks, 0), Precision(), device, sequence_length=8, lm_head=head
    )
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("numbers", [runs.STUDENT, ODD_HEADS], ids=["student", "head_dim"])
def test_parameters_are_those_of_the_built_model(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, check, numbers: dict[str, int], tied: bool
) -> None:
    shape = ModelShape(**numbers, tied_embeddings=tied)
    ((total, inner),) = pool.run(parameter_counts, shape, world=1)
    assert (size.parameters(shape), size.non_embedding_parameters(shape)) == (total, inner)
    model = {**numbers, "tied_embeddings": tied}
    report = check("adapt", runs.adapt_config(fixtures, tmp_path / "run", student__model=model), 1)
    assert re.search(rf"^student +{total:,} +{inner:,} ", report, re.MULTILINE)


@pytest.mark.parametrize("head", [True, False], ids=["whole", "without_head"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_share_of_every_rank_is_what_it_builds(pool: WorkerPool, tied: bool, head: bool) -> None:
    shape = ModelShape(**runs.STUDENT, tied_embeddings=tied)
    for layout, ranks in ((Layout(tensor=2, pipeline=2), 4), (Layout(tensor=2), 2)):
        found = pool.run(shard_count, shape, layout, head, world=ranks)
        stages = [rank // 2 for rank in range(ranks)]
        assert found == [size.rank_parameters(shape, layout, stage, lm_head=head) for stage in stages]


def test_grid_and_work_of_a_distillation(fixtures: Fixtures, teacher: Path, tmp_path: Path, check) -> None:
    layout = {"tensor": 2, "pipeline": 2, "sequence": True}
    report = check("distill", runs.distill_config(fixtures, tmp_path / "run", teacher, student__layout=layout), 8)
    assert report.startswith("distill: the configuration is valid\n")
    lines = report.splitlines()
    assert any(
        line.startswith("teacher ") and f"{size.parameters(ModelShape(**runs.TEACHER)):,}" in line for line in lines
    )
    assert "rank grid: 8 ranks = tensor 2 x data 2 x pipeline 2, sequence parallel" in lines
    assert "  stage 0: [0-1] [2-3]" in lines and "  stage 1: [4-5] [6-7]" in lines
    assert "tokens per step: 256 = 8 sequences x 32; 2 micro-batches of 2 per data-parallel rank" in lines
    assert any(line.startswith("run: 4 steps, 1,024 tokens, ") for line in lines)
    memory = lines.index("memory of the fullest rank on a CPU, MiB")
    assert lines[-1].startswith("  total") and memory < len(lines) - 1


def test_stages_are_told_their_work_and_a_better_split(fixtures: Fixtures, tmp_path: Path, check) -> None:
    """A large vocabulary: the last of eight stages computes as much for the loss as three or four layers."""
    model = {"layers": 32, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 128256}
    changes = {"student__model": {"family": "llama", **model}, "train__global_batch": 8}
    found = []
    for split in (None, [5, 5, 4, 4, 4, 4, 4, 2]):
        layout = {"pipeline": 8, "stage_layers": split}
        report = check("adapt", runs.adapt_config(fixtures, tmp_path / "run", student__layout=layout, **changes), 8)
        (line,) = (line for line in report.splitlines() if line.startswith("work of each stage"))
        found.append(line)
    work, best = found[0].split("; with student.layout.stage_layers: ")
    numbers = [float(number) for number in work.split(": ")[1].split()]
    assert len(numbers) == 8 and sum(numbers) == pytest.approx(8, abs=0.05) and len(set(numbers[:-1])) == 1
    assert numbers[-1] > 1.5 * numbers[0]
    split, most = best.split(" at most ")
    assert sum(map(int, split.strip("[]").split(", "))) == 32 and float(most) < 1.2
    assert float(found[1].split(": ")[1].split(";")[0].split()[0]) > 1.05, "five layers are more than the mean"


def test_a_teacher_in_a_layout_of_its_own(fixtures: Fixtures, teacher: Path, tmp_path: Path, check) -> None:
    """Weights and waiting hidden states a rank, with sequences long enough to show in MiB."""
    layout = {"tensor": 2, "pipeline": 2, "sequence": True}
    changes = {"student__layout": layout, "data__sequence_length": 65536, "teacher__longer_sequences": True}
    changes |= {"teacher__layout": {"pipeline": 4}, "teacher__placement": "disjoint", "teacher__ranks": 4}
    changes |= {"teacher__ahead": 3, "data__valid": None}
    lines = check("distill", runs.distill_config(fixtures, tmp_path / "run", teacher, **changes), 8).splitlines()
    assert "rank grid: 4 ranks = tensor 2 x data 1 x pipeline 2, sequence parallel" in lines
    assert lines[lines.index("teacher rank grid: 4 ranks = tensor 1 x data 1 x pipeline 4") + 1] == "  stage 0: [4]"
    batch = 8 * 65536 * 48 * 4 / 2**20  # one output of the teacher's
    assert (
        f"teacher hidden states per global batch: at most {batch:.1f} MiB on each rank of the teacher, "
        f"{batch / 2:.1f} MiB on each rank of the student's last stage; up to 3 stored on the teacher's ranks"
    ) in lines
    fullest = lines.index("memory of the teacher's fullest rank, MiB")
    table = dict(line.strip().rsplit(maxsplit=1) for line in lines[fullest + 1 : fullest + 4])
    assert table["teacher hidden"] == f"{2 * batch:.1f}" and float(table["teaching"]) > batch
    for key in ("teacher__placement", "teacher__ranks", "teacher__ahead"):
        del changes[key]
    changes |= {"teacher__layout": {"tensor": 2}, "teacher__offload": True}
    lines = check("distill", runs.distill_config(fixtures, tmp_path / "run", teacher, **changes), 4).splitlines()
    assert "teacher rank grid: 4 ranks = tensor 2 x data 2 x pipeline 1" in lines
    assert any(
        line.startswith("teacher per rank: ") and line.endswith("weights in host memory between its forward passes")
        for line in lines
    )
    assert any(f"{batch / 2:.1f} MiB on each rank of the teacher, {batch / 2:.1f} MiB on each" in x for x in lines)


def test_sequences_longer_than_the_teacher_s_are_asked_for(
    fixtures: Fixtures, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.distill_config(fixtures, tmp_path / "run", teacher, data__sequence_length=33)
    words = ["distill", "--config", runs.write_config(config), "--check-world=1"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.sequence_length: 33 is longer than the 32 tokens that the teacher" in line
    assert line.endswith("use at most 32, or set teacher.longer_sequences: true")
    assert main([*words, "--teacher.longer_sequences=true"]) == 0


def test_the_grid_is_the_one_that_megatron_makes(pool: WorkerPool) -> None:
    layout = Layout(tensor=2, pipeline=2)
    assert pool.run(place_in_grid, layout, world=8) == [(rank % 2, rank // 2 % 2, rank // 4) for rank in range(8)]


def place_in_grid(layout_of_ranks: Layout) -> tuple[int, int, int]:
    """Runs in a worker: (tensor, data, pipeline) rank."""
    from megatron_capgap.devices import choose
    from megatron_capgap.distributed import parallel_context

    choose("cpu", 0)
    grid = parallel_context.build(layout_of_ranks, 0)
    return grid.tp_rank, grid.dp_rank, grid.pp_rank


def test_a_run_that_has_begun_says_where_it_goes_on(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "run", train__steps=2)
    runs.train(pool, "adapt", config)
    before = runs.files_of(tmp_path / "run")
    words = ["adapt", "--config", runs.write_config(config), "--check-world=1", "--train.steps=9"]
    assert main(words) == 0
    assert "resumes from step 2\n" in capsys.readouterr().out
    assert runs.files_of(tmp_path / "run") == before


def test_four_thousand_ranks_without_torch_within_ten_seconds(fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"student__model": SEVENTY_BILLION, "student__layout": {"tensor": 8, "pipeline": 16, "sequence": True}}
    changes |= {"train__global_batch": 2048, "train__micro_batch": 1, "data__sequence_length": 4096}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    program = (
        "import sys; from megatron_capgap.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "raise SystemExit(code or (f'imported {heavy}' if heavy else 0))"
    )
    words = ["adapt", "--config", runs.write_config(config), "--check", "--check-world", "4096"]
    began = cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    seconds = cpu_seconds() - began
    assert (done.returncode, done.stderr) == (0, "")
    assert seconds < 10.0
    assert f"{70_553_706_496:,}" in done.stdout  # as published for LLaMA 3 70B
    assert "rank grid: 4096 ranks = tensor 8 x data 32 x pipeline 16, sequence parallel\n" in done.stdout
    assert "stage 15: [3840-3847] [3848-3855] [3856-3863] [3864-3871] ... 32 tensor-parallel groups\n" in done.stdout
    assert "tokens per step: 8,388,608 = 2048 sequences x 4096; 64 micro-batches of 1 per" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["adapt", "distill"])
def test_resolved_yaml_loads_back_equal(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, stage: str
) -> None:
    changes = {"train__steps": 1, "optimizer__lr": 1.0e-7, "optimizer__min_lr": None, "data__train_weights": [1]}
    if stage == "adapt":
        config = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    else:
        config = runs.distill_config(fixtures, tmp_path / "run", teacher, **changes)
    overrides = ["--train.log_every=3", "--optimizer.betas=[0.8, 0.99]"]
    (rank,) = runs.run_stage(pool, stage, config, overrides=overrides)
    assert rank.value == 0
    asked = load(str(tmp_path / "run.yaml"), overrides, stage).config
    assert load(str(tmp_path / "run" / "resolved.yaml"), [], stage).config == asked
    assert asked.train.log_every == 3
