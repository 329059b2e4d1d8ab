"""The command line: what it means, who speaks, and the exit codes. Only the stages are stood in for."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import megatron_capgap
from megatron_capgap import cli
from megatron_capgap.common.errors import UserError
from megatron_capgap.config import help
from megatron_capgap.config.fields import table
from megatron_capgap.config.schema import STAGES
from tests.support.processes import cpu_seconds, environment

CONFIG = """\
run_dir: runs/one
student: {model: {layers: 2, hidden: 16, heads: 2, ffn: 32, vocab: 100}}
data: {tokenizer: t.model, train: [a], valid: [b]}
train: {steps: 5}
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A folder with adapt.yaml, no launcher, and stand-ins for the stages that record their calls."""
    monkeypatch.chdir(tmp_path)
    Path("adapt.yaml").write_text(CONFIG)
    Path("settings").write_text(CONFIG)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    calls = SimpleNamespace(run=[], report=[], checked=[], answer=0, slept=[])

    def answer() -> int:
        if isinstance(calls.answer, BaseException):
            raise calls.answer
        return calls.answer

    def resolve(loaded, stage, world):
        return SimpleNamespace(loaded=loaded, stage=stage, world=world)

    def run(plan, environment, device) -> int:
        calls.run.append((plan.loaded, environment))
        assert (device.name, device.capability) == (f"cpu of {environment.local_rank}", calls.checked.pop())
        return answer()

    def report(loaded, stage, world, capability) -> str:
        calls.report.append((stage, world, capability))
        return f"{stage} at {world} is right{answer() or ''}\n"

    for stage in STAGES:
        monkeypatch.setitem(sys.modules, f"megatron_capgap.stages.{stage}", SimpleNamespace(run=run))
    resolver = SimpleNamespace(resolve=resolve, check_device=lambda plan, capability: calls.checked.append(capability))
    monkeypatch.setitem(sys.modules, "megatron_capgap.stages.resolve", resolver)

    def choose(name, local_rank, precisions, place):
        return SimpleNamespace(name=f"cpu of {local_rank}", capability=(9, 0))

    devices = SimpleNamespace(choose=choose)
    monkeypatch.setitem(sys.modules, "megatron_capgap.devices", devices)
    monkeypatch.setitem(sys.modules, "megatron_capgap.stages.check", SimpleNamespace(report=report))
    monkeypatch.setattr(cli.time, "sleep", calls.slept.append)
    return calls


def as_rank(monkeypatch, rank: int, world: int) -> None:
    values = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_stage_runs_with_its_configuration_and_its_exit_code_is_returned(stages, capsys):
    stages.answer = 7
    assert cli.main(["adapt", "--config", "adapt.yaml", "--train.steps", "9", "--seed=3"]) == 7
    ((loaded, environment),) = stages.run
    assert (loaded.config.train.steps, loaded.config.seed) == (9, 3)
    assert loaded.sources["train.steps"] == "--train.steps"
    assert (environment.rank, environment.world) == (0, 1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", [["--check-world", "16"], ["--check-world=16"], ["--check", "--check-world=16"]])
def test_check_world_reports_and_runs_nothing(stages, capsys, words):
    assert cli.main(["adapt", "--config=adapt.yaml", *words]) == 0
    assert stages.report == [("adapt", 16, None)] and stages.run == []
    assert capsys.readouterr().out == "adapt at 16 is right\n"


@pytest.mark.parametrize("words", [["--check-capability", "9.0"], ["--check", "--check-capability=9.0"]])
def test_check_capability_supposes_gpus(stages, words):
    assert cli.main(["adapt", "--config=adapt.yaml", *words]) == 0
    assert stages.report == [("adapt", 1, (9, 0))] and stages.run == []


@pytest.mark.parametrize("given", ["9", "h100", "9.x", ""])
def test_a_capability_has_two_numbers(stages, capsys, given):
    assert cli.main(["adapt", "--config=adapt.yaml", f"--check-capability={given}"]) == 2
    assert (
        f"--check-capability: {given} given; valid values: 8.0 (A100), 9.0 (H100), 10.0 (B200)"
        in capsys.readouterr().err
    )
    assert stages.report == [] and stages.run == []


def test_check_takes_the_world_of_the_launcher_and_only_the_first_rank_prints(stages, capsys, monkeypatch):
    for rank in range(2):
        as_rank(monkeypatch, rank, 4)
        assert cli.main(["--check", "adapt", "--config", "adapt.yaml"]) == 0
    assert stages.report == [("adapt", 4, None)] * 2
    assert capsys.readouterr().out == "adapt at 4 is right\n"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no stage given; valid values: adapt, prune, distill, finetune, evaluate; see --help"),
        (
            ["distil"],
            "distil: unknown stage; did you mean distill? valid values: adapt, prune, distill, finetune, evaluate",
        ),
        (["cook", "--help"], "cook: unknown stage; valid values: adapt, prune, distill, finetune, evaluate"),
        (["adapt"], "--config: missing; use adapt --config FILE"),
        (["adapt", "--config"], "--config: no value given; use --config=VALUE"),
        (["adapt", "--config", "--check"], "--config: no value given; use --config=VALUE"),
        (
            ["adapt", "--config", "adapt.yaml", "--chek"],
            "--chek: unknown option or key; did you mean --check?",
        ),
        (
            ["adapt", "--config", "adapt.yaml", "--sede=3"],
            "--sede: unknown option or key; did you mean --seed?",
        ),
        (["adapt", "--config", "adapt.yaml", "-x"], "-x: unknown option or key; "),
        (
            ["adapt", "--config", "adapt.yaml", "--check=8"],
            "--check=8: --check takes no value; use --check alone",
        ),
        (
            ["adapt", "adapt.yaml"],
            "adapt.yaml: unexpected argument, the stage is adapt; did you mean --config adapt.yaml?",
        ),
        (
            ["adapt", "nowhere.yml"],
            "nowhere.yml: unexpected argument, the stage is adapt; did you mean --config nowhere.yml?",
        ),
        (["adapt", "settings"], "settings: unexpected argument, the stage is adapt; did you mean --config settings?"),
        (["adapt", "train.steps=3"], "train.steps=3: unexpected argument, the stage is adapt; use --KEY=VALUE"),
        (
            ["adapt", "--config", "adapt.yaml", "--check-world", "0"],
            "--check-world: 0 given; expected an integer > 0",
        ),
        (
            ["adapt", "--config", "adapt.yaml", "--check-world=-4"],
            "--check-world: -4 given; expected an integer > 0",
        ),
        (
            ["adapt", "--config", "adapt.yaml", "--train.steps"],
            "--train.steps: no value given; use --train.steps=",
        ),
        (["adapt", "--config", "nowhere.yaml"], "nowhere.yaml: cannot read the configuration: No such file"),
        (["adapt", "--config", "adapt.yaml", "--train.stesp=3"], "unknown key; did you mean train.steps?"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(stages, capsys, words, message):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.startswith("capgap: error: ") and err.count("\n") == 1
    assert stages.run == [] and stages.report == [] and not Path("runs").exists()


def test_every_problem_has_its_own_line(stages, capsys):
    assert cli.main(["adapt", "--config", "adapt.yaml", "--train.stesp=3", "--optimizer.lr=0", "--device=gpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("capgap: error: --") for line in lines)


def test_one_rank_speaks_for_all_that_have_met(stages, capsys, monkeypatch):
    stages.answer = UserError("data.train: a.bin is cut short; prepare it again")
    stages.answer.raised_on_all_ranks = True
    for rank in range(4):
        as_rank(monkeypatch, rank, 4)
        assert cli.main(["adapt", "--config", "adapt.yaml"]) == 2
    assert capsys.readouterr().err == "capgap: error: data.train: a.bin is cut short; prepare it again\n"
    assert len(stages.slept) == 3  # the silent ranks leave the first one time to speak


@pytest.mark.parametrize(
    "words", [["distil"], ["adapt", "--config", "nowhere.yaml"], ["adapt", "--config", "adapt.yaml"]]
)
def test_a_rank_that_is_alone_with_its_mistake_says_so(stages, capsys, monkeypatch, words):
    stages.answer = UserError("student.checkpoint: runs/a: no such checkpoint; name one")
    as_rank(monkeypatch, 0, 4)
    assert cli.main(words) == 2
    first = capsys.readouterr().err
    as_rank(monkeypatch, 3, 4)
    assert cli.main(words) == 2
    assert len(stages.slept) == 1  # a launcher ends it here where the first rank has the same mistake
    assert capsys.readouterr().err == first.replace("error: ", f"error: rank 3 on {socket.gethostname()}: ")


def test_a_broken_launcher_is_one_line(stages, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["adapt", "--config", "adapt.yaml"]) == 2
    assert capsys.readouterr().err.startswith("capgap: error: environment variable WORLD_SIZE is not set")


def test_an_interrupt_is_130_and_a_bug_keeps_its_traceback(stages):
    stages.answer = KeyboardInterrupt()
    assert cli.main(["adapt", "--config", "adapt.yaml"]) == 130
    stages.answer = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["adapt", "--config", "adapt.yaml"])


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_key(stage):
    text = " ".join(help.stage_help(stage).split())
    for key in list(table().values())[1:]:
        assert f"{key.name}: " in text
        assert " ".join(key.doc.split()) in text
        if not key.children:
            state = "required" if key.required else f"default {key.default}"
            assert f"{key.name}: {key.type} ({state})" in text
    assert max(map(len, help.stage_help(stage).splitlines())) <= 120
    assert "torchrun" in text and "srun" in text and "python -m" in text


def python(*words: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(megatron_capgap.__file__).parents[1])}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, **options)


@pytest.mark.parametrize("words", [["--help"], ["-h"], *([stage, "--help"] for stage in STAGES), ["--version"]])
def test_help_answers_without_anything_heavy(words):
    program = (
        "import sys; from megatron_capgap.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules)\n"
        "raise SystemExit(code or (f'imported {heavy}' if heavy else 0))"
    )
    began = cpu_seconds()
    done = python("-c", program, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert cpu_seconds() - began < 1
    assert done.stdout.startswith("capgap")
    if words[0] in ("--help", "-h"):
        assert all(f"\n  {stage} " in done.stdout for stage in STAGES)


def test_torchrun_tells_a_misspelt_key_once(tmp_path):
    """Its own report follows; every rank has left with code 2, and none has imported torch."""
    (tmp_path / "adapt.yaml").write_text(CONFIG)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_capgap"]
    words += ["adapt", "--config", "adapt.yaml", "--train.stesp=3"]
    done = subprocess.run(
        [sys.executable, *words], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = (line for line in done.stderr.splitlines() if "capgap: " in line)
    assert line == "capgap: error: --train.stesp: unknown key; did you mean train.steps?"
    assert set(re.findall(r"exitcode *: (\d+)", done.stderr)) == {"2"}
    assert not (tmp_path / "runs").exists()


def test_the_module_is_the_door(tmp_path):
    done = python("-m", "megatron_capgap", "distil", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("capgap: error: distil: unknown stage; did you mean distill?")
    assert done.stderr.count("\n") == 1
