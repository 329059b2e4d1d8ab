"""The lines of examples/slurm/stage.sbatch that a user uncomments: bash takes them, and srun gets what they say."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT

SCRIPT = (ROOT / "examples" / "slurm" / "stage.sbatch").read_text()
OPTIONS = re.findall(r"^# ((?:module|source|\w+=\().*)$", SCRIPT, re.M)


def run(script: str, folder: Path) -> list[str]:
    """Runs a batch script in a folder of commands that say their words, one a line; returns what they said."""
    place = folder / "with a space"
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "activate").write_text("echo activated\n")
    for name in ("srun", "module"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        (folder / name).chmod(0o755)
    (folder / "script").write_text(script)
    subprocess.run(["bash", "-n", folder / "script"], check=True)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(place)}
    done = subprocess.run(
        ["bash", folder / "script", "distill", "--config", "a b.yaml"],
        cwd=place,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


RANKS = ["python", "-m", "megatron_capgap", "distill", "--config", "a b.yaml"]


def test_as_it_is_srun_starts_the_stage(tmp_path: Path) -> None:
    assert run(SCRIPT, tmp_path) == ["srun", "--kill-on-bad-exit=1", *RANKS]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: re.split(r"\W", option)[0])
def test_an_option_that_is_uncommented(tmp_path: Path, option: str) -> None:
    assert SCRIPT.count(f"# {option}\n") == 1
    said = run(SCRIPT.replace(f"# {option}\n", f"{option}\n"), tmp_path)
    here = tmp_path / "with a space"
    mounts = ["--container-image=/images/capgap.sqsh", f"--container-mounts={here}:{here}"]
    before, flags = {
        "module": (["module", "load", "cuda"], []),
        "source": (["activated"], []),
        "container": ([], [*mounts, f"--container-workdir={here}"]),
    }[re.split(r"\W", option)[0]]
    assert said == [*before, "srun", "--kill-on-bad-exit=1", *flags, *RANKS]


def test_every_option_is_known() -> None:
    assert len(OPTIONS) == 3
