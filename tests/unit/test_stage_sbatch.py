"""examples/slurm/stage.sbatch on commands that are SLURM's by name alone: what it starts, and how it ends."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import ROOT

SCRIPT = (ROOT / "examples" / "slurm" / "stage.sbatch").read_text()
# The lines that a user uncomments.
OPTIONS = re.findall(r"^# ((?:module|source|\w+=\().*)$", SCRIPT, re.M)
# srun runs its command once; NODES, where it has one, is what it does instead for one task a node.
COMMANDS = {
    "module": "",
    "srun": """\
case "$*" in *--ntasks=*) eval "${NODES:-}" ;; esac
while case $1 in -*) ;; *) false ;; esac; do shift; done
"$@"
""",
    "python": """\
case "$*" in *--version) eval "${VERSION:-echo capgap 0.1.0}" ;; *) eval "${STAGE:-true}" ;; esac
""",
    "squeue": "echo RUNNING\n",
    "scontrol": "",
    "scancel": "",
}
NO_MODULE = "echo python: No module named megatron_capgap >&2; exit 1"


@dataclass
class Ended:
    """How the script ended."""

    code: int
    said: list[list[str]]
    """The commands that it called, with their words."""
    output: str

    def called(self, name: str) -> list[list[str]]:
        """What one command was given, call by call."""
        return [words for command, *words in self.said if command == name]


def run(script: str, folder: Path, **variables: str) -> Ended:
    """Runs a batch script in a folder with a space, with NODES, VERSION and STAGE for the bodies of COMMANDS."""
    place = folder / "with a space"
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "activate").write_text('echo activated >>"$SAID"\n')
    (folder / "bin").mkdir()
    for name, body in COMMANDS.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\n(printf "%s\\t" {name} "$@"; echo) >>"$SAID"\n{body}')
        (folder / "bin" / name).chmod(0o755)
    (folder / "script").write_text(script)
    subprocess.run(["bash", "-n", folder / "script"], check=True)
    inherited = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SAID": f"{folder}/said"}
    inherited |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(place), "SLURM_NNODES": "2"}
    done = subprocess.run(
        ["bash", folder / "script", "distill", "--config", "a b.yaml"],
        cwd=place,
        env={**inherited, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert not list(place.glob(".capgap-*"))
    lines = (folder / "said").read_text().splitlines()
    return Ended(done.returncode, [line.rstrip("\t").split("\t") for line in lines], done.stdout)


ONE_A_NODE = ["--ntasks=2", "--ntasks-per-node=1"]
RANKS = ["python", "-m", "megatron_capgap", "distill", "--config", "a b.yaml"]


def test_as_it_is_srun_starts_the_stage(tmp_path: Path) -> None:
    ended = run(SCRIPT, tmp_path)
    assert (ended.code, ended.output) == (0, "")
    asked, started = ended.called("srun")
    assert asked[:3] == ["--kill-on-bad-exit=1", *ONE_A_NODE] and asked[-1] == "python"
    assert started == ["--kill-on-bad-exit=1", *RANKS]
    assert ended.called("python") == [["-m", "megatron_capgap", "--version"], RANKS[1:]]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: re.split(r"\W", option)[0])
def test_an_option_that_is_uncommented(tmp_path: Path, option: str) -> None:
    assert SCRIPT.count(f"# {option}\n") == 1
    ended = run(SCRIPT.replace(f"# {option}\n", f"{option}\n"), tmp_path)
    here = tmp_path / "with a space"
    mounts = ["--container-image=/images/capgap.sqsh", f"--container-mounts={here}:{here}"]
    before, flags = {
        "module": ([["module", "load", "cuda"]], []),
        "source": ([["activated"]], []),
        "container": ([], [*mounts, f"--container-workdir={here}"]),
    }[re.split(r"\W", option)[0]]
    assert (ended.code, ended.output) == (0, "")
    assert ended.said[: len(before)] == before
    asked, started = ended.called("srun")
    assert asked[: len(flags) + 3] == ["--kill-on-bad-exit=1", *flags, *ONE_A_NODE]
    assert started == ["--kill-on-bad-exit=1", *flags, *RANKS]


def test_every_option_is_known() -> None:
    assert len(OPTIONS) == 3


@pytest.mark.parametrize(
    "variables", [{"VERSION": NO_MODULE}, {"CAPGAP_PYTHON": "nopython"}], ids=["no module", "no python"]
)
def test_an_environment_without_the_program_is_refused_at_once(tmp_path: Path, variables: dict[str, str]) -> None:
    ended = run(SCRIPT, tmp_path, **variables)
    python = variables.get("CAPGAP_PYTHON", "python")
    assert ended.code == 2
    assert f"stage.sbatch: error: no node can run {python} -m megatron_capgap (see above); " in ended.output
    assert "let CAPGAP_PYTHON name its python" in ended.output
    assert len(ended.called("srun")) == 1 and not ended.called("scontrol")


@pytest.mark.parametrize(
    "variables",
    [
        {"NODES": "echo nothing; echo capgap 0.1.0; exit 0"},
        {"NODES": "exit 1"},
        {"SLURM_RESTART_COUNT": "1", "VERSION": NO_MODULE},
    ],
    ids=["one node lacks it", "no task was started", "it ran before"],
)
def test_a_broken_node_is_no_wrong_environment(tmp_path: Path, variables: dict[str, str]) -> None:
    """The ranks try, and where they die the job comes back."""
    ended = run(SCRIPT, tmp_path, STAGE="exit 1", **variables)
    assert ended.code == 0
    assert RANKS[1:] in ended.called("python")
    assert re.fullmatch(r"stage.sbatch: start [12] died \(exit code 1\); requeued\n", ended.output)
    assert ended.called("scontrol") == [["requeue", "7"]]


def test_told_to_end_before_the_ranks_were_started(tmp_path: Path) -> None:
    """What was told to the tasks that looked for the program is not lost on the ranks that come after them."""
    ended = run(SCRIPT, tmp_path, NODES='kill -USR1 $PPID; until grep -q scancel "$SAID"; do sleep 0.01; done; exit 0')
    assert ended.code == 0
    assert RANKS[1:] not in ended.called("python")
    assert ended.called("scancel") == [["--signal=USR1", "7"]]
    assert ended.output == "stage.sbatch: start 1 stopped before the end of the run; requeued\n"
    assert ended.called("scontrol") == [["requeue", "7"]]


def test_refused_input_is_not_requeued(tmp_path: Path) -> None:
    ended = run(SCRIPT, tmp_path, STAGE='echo refused >"$CAPGAP_OUTCOME"; exit 2')
    assert ended.code == 2 and not ended.called("scontrol")
