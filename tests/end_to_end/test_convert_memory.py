"""No process holds a model while it converts one: resident sets of the tool as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import convert
from tests.support.processes import ROOT, environment


def peak(*words: object) -> int:
    command = [sys.executable, "-W", "ignore", "-c", convert.CALL, *map(str, words)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_stays_near_the_largest_tensors(tmp_path: Path) -> None:
    convert.make(tmp_path / "tiny", layers=2, hidden=128, vocab=300)
    nbytes = convert.make(tmp_path / "hf", layers=8, hidden=2048, vocab=16000)
    base = peak("import", "--hf", tmp_path / "tiny", "--out", tmp_path / "tiny_run")
    assert nbytes > 700e6
    for words in (["import", "--hf", tmp_path / "hf"], ["export", "--checkpoint", tmp_path / "run"]):
        out = tmp_path / ("run" if words[0] == "import" else "back")
        extra = peak(*words, "--out", out) - base
        assert extra < 0.25 * nbytes, f"{words[0]}: {extra / 1e6:.0f} MB beside {nbytes / 1e6:.0f} MB of weights"
    assert (tmp_path / "back/model.safetensors").stat().st_size >= nbytes - 100_000
