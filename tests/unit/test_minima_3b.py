"""The paper's recipe: every stage passes --check on 16 and 128 GPUs, in their memory, and has the paper's numbers."""

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from megatron_capgap.config.load import load
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


@pytest.mark.parametrize("gpus", [16, 128])
def test_every_stage_fits(gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reports = dict(example().reports(gpus))
    assert {f"{stage}.yaml" for stage in reports} == {file.name for file in HERE.glob("*.yaml")}
    for stage, report in reports.items():
        assert report.startswith(f"{stage}: the configuration is sound\n")
        assert f"rank grid: {gpus} ranks = " in report
        (need,) = re.findall(r"memory of the fullest rank on a GPU, MiB\n(?:.*\n)*?  in all +([\d,.]+)", report)
        assert float(need.replace(",", "")) < ROOM_MIB, report
        assert re.search(rf"^student +{TEACHER if stage == 'adapt' else STUDENT:,} ", report, re.MULTILINE)
    for stage in ("prune", "distill"):
        assert re.search(rf"^teacher +{TEACHER:,} ", reports[stage], re.MULTILINE)
        assert "the teacher is 2.38 times the student" in reports[stage]
    for stage in ("adapt", "distill"):
        assert "tokens a step: 4,194,304 = 1024 sequences x 4096" in reports[stage]
    assert "30,041 steps, 126,001,086,464 tokens" in reports["distill"]


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
    done = subprocess.run(["bash", str(HERE / "run.sh"), "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("run.sh: error: fly: import, ")
