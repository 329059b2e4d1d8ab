"""The paper's recipe: every stage passes --check on 16 and 128 GPUs, in their memory, and has the paper's numbers."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from megatron_capgap.config.loader import load
from megatron_capgap.stages import check
from tests.support.processes import ROOT
from tools import convert_hf, expand_vocab, prepare_data

HERE = ROOT / "examples" / "minima_3b"
# An A100 or H100 of 80 GB has 80 GiB less what the driver keeps; communication buffers and libraries want some, too.
ROOM_MIB = 64 * 1024
# huggingface.co counts them: the adapted LLaMA2-7B, and MiniMA-3B.
TEACHER, STUDENT = 6_879_449_088, 3_020_442_624


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minima_3b_check", HERE / "check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A line of a table in a comment: options, or "as it is", and what --check counts in GiB on 16 GPUs and on 128.
ROW = re.compile(r"^ *#   (as it is|--\S.*?) +(\d+\.\d) +(\d+\.\d)$", re.MULTILINE)


def need_mib(report: str) -> float:
    (need,) = re.findall(r"memory of the fullest rank on a GPU, MiB\n(?:.*\n)*?  total +([\d,.]+)", report)
    return float(need.replace(",", ""))


@pytest.mark.parametrize("gpus", [16, 128])
def test_every_stage_fits(gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the comments say how well, and what other layouts would need."""
    monkeypatch.chdir(tmp_path)
    reports = dict(example().reports(gpus))
    assert {f"{stage}.yaml" for stage in reports} == {file.name for file in HERE.glob("*.yaml")}
    for stage, report in reports.items():
        assert report.startswith(f"{stage}: the configuration is valid\n")
        assert f"rank grid: {gpus} ranks = " in report
        assert need_mib(report) < ROOM_MIB, report
        assert re.search(rf"^student +{TEACHER if stage == 'adapt' else STUDENT:,} ", report, re.MULTILINE)
        file = HERE / f"{stage}.yaml"
        rows = ROW.findall(file.read_text())
        assert [options for options, *_ in rows].count("as it is") == 1
        for options, *needs in rows:
            words = [] if options == "as it is" else [word.removeprefix("--") for word in options.split()]
            other = check.report(load(str(file), ["run_dir=runs/new", *words], stage), stage, gpus)
            assert needs[gpus == 128] == f"{need_mib(other) / 1024:.1f}", f"{file.name}: {options} on {gpus} GPUs"
    for stage in ("prune", "distill"):
        assert re.search(rf"^teacher +{TEACHER:,} ", reports[stage], re.MULTILINE)
        assert "capacity gap T/S: 2.38" in reports[stage]
    for stage in ("adapt", "distill"):
        assert "tokens per step: 4,194,304 = 1024 sequences x 4096" in reports[stage]
    assert "30,041 steps, 126,001,086,464 tokens" in reports["distill"]
    assert "scores: 32 global batches, 8,388,608 tokens" in reports["prune"]


def test_the_memory_is_told_in_tables_alone() -> None:
    """Where the test above sees it."""
    for file in HERE.iterdir():
        for line in file.read_text().splitlines() if file.is_file() else []:
            assert not re.search(r"\d *[GM]i?B", line) or "80 GB" in line, f"{file.name}: {line}"


def test_the_numbers_of_the_paper() -> None:
    """As its code has them."""
    adapt, distill = (load(str(HERE / f"{stage}.yaml"), [], stage).config for stage in ("adapt", "distill"))
    for config, rate in ((adapt, 3e-5), (distill, 3e-4)):
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.schedule, optimizer.warmup_fraction) == (rate, "cosine", 0.01)
        assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.betas) == (0.1, 1.0, (0.9, 0.95))
        assert (optimizer.epsilon, config.precision.compute, config.seed) == (1e-8, "bf16", 776)
    objective = distill.objective
    assert (objective.divergence, objective.temperature) == ("soft_cross_entropy", 1.0)
    assert objective.divergence_weight == objective.cross_entropy_weight == 0.5
    chat = load(str(HERE / "finetune.yaml"), [], "finetune").config
    assert chat.finetune is not None and (chat.finetune.epochs, chat.finetune.patience) == (3, 2)
    assert (chat.optimizer.lr, chat.optimizer.warmup_fraction, chat.train.global_batch) == (2e-5, 0.1, 256)
    prune = load(str(HERE / "prune.yaml"), [], "prune").config
    assert prune.prune is not None and prune.prune.layers_by == "position"
    assert (prune.data.sequence_length, prune.train.micro_batch) == (512, 8)


def test_the_script_s_calls_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Its syntax, its options and its files; what it runs needs a cluster."""
    script = (HERE / "run.sh").read_text()
    subprocess.run(["bash", "-n", str(HERE / "run.sh")], check=True)
    calls = script.replace("\\\n", " ")
    for tool in (convert_hf, expand_vocab, prepare_data):
        name = tool.__name__.rpartition(".")[2]
        lines = [line.partition(f"/{name}.py")[2] for line in calls.splitlines() if f"/{name}.py" in line]
        assert lines
        for line in lines:
            command = line.lstrip('" ').split()[0]
            with pytest.raises(SystemExit):
                tool.parse_arguments([command, "--help"] if command.isalpha() else ["--help"])
            known = capsys.readouterr().out
            assert set(re.findall(r"--[a-z-]+", line)) <= set(re.findall(r"--[a-z-]+", known)), line


class Called(NamedTuple):
    """A call of run.sh."""

    code: int
    out: str
    err: str
    jobs: list[list[str]]
    """What sbatch was given, call by call."""


def call(folder: Path, *words: str, sbatch: str = "echo $((40 + $(wc -l <said)))';cluster'") -> Called:
    """Calls it in a folder with a space, where sbatch says its words and does as told."""
    work = folder / "at work"
    work.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\n(printf "%s\\t" "$CAPGAP_PYTHON" "$@"; echo) >>said\n{sbatch}\n')
    (folder / "sbatch").chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "WORK": str(work), "PYTHON": "/some/python", "NODES": "16"}
    done = subprocess.run(
        ["bash", str(HERE / "run.sh"), *words], env=variables, capture_output=True, text=True, timeout=60
    )
    said = (work / "said").read_text().splitlines() if (work / "said").exists() else []
    return Called(done.returncode, done.stdout, done.stderr, [line.rstrip("\t").split("\t") for line in said])


def test_the_stages_of_a_call_wait_for_each_other(tmp_path: Path) -> None:
    called = call(tmp_path, "prune", "distill", "evaluate", "--train.log_every=50")
    assert (called.code, called.err) == (0, "")
    assert called.out == "prune: job 41\ndistill: job 42\nevaluate: job 43\n"
    size = ["--nodes=16", "--ntasks-per-node=8", "--gpus-per-node=8"]
    for stage, before, job in zip(("prune", "distill", "evaluate"), (None, 41, 42), called.jobs, strict=True):
        wait = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        script, config = HERE / ".." / "slurm" / "stage.sbatch", HERE / f"{stage}.yaml"
        assert script.is_file() and config.is_file()
        end = [str(script), stage, "--config", str(config), "--train.log_every=50"]
        assert job == ["/some/python", "--parsable", f"--job-name={stage}", *size, *wait, *end]


def test_a_stage_that_is_not_submitted_ends_the_call(tmp_path: Path) -> None:
    called = call(tmp_path, "adapt", "prune", sbatch="echo sbatch: error: no such partition >&2; exit 1")
    assert called.code == 1 and called.err == "sbatch: error: no such partition\n" and len(called.jobs) == 1


@pytest.mark.parametrize(
    "words, error",
    [
        (["fly"], "fly: import, vocabulary, data, adapt, prune, "),
        (["adapt", "--train.steps", "5"], "5: import, "),
        (["distill", "export"], "export: would not wait for the job of distill; call it when that has ended"),
        (["--train.steps=5"], "no step given; "),
    ],
)
def test_wrong_steps_are_refused_before_any_is_taken(tmp_path: Path, words: list[str], error: str) -> None:
    called = call(tmp_path, *words)
    assert called.code == 2 and called.err.startswith(f"run.sh: error: {error}") and called.jobs == []
