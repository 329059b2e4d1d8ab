"""No process holds a model while it cuts a smaller one out of it: the resident set of `apply` by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import convert
from tests.support.processes import ROOT, environment

# Three quarters of every width, by random scores.
CUT = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from megatron_capgap.runtime import launch
from megatron_capgap.runtime.devices import choose
device = choose("cpu", 0)
launch.join(launch.read_environment({}), device, 60)
import torch
from megatron_capgap.checkpoint import manifest
from megatron_capgap.pruning import plan
from megatron_capgap.pruning.apply import apply
from megatron_capgap.pruning.scores import Scores
teacher = manifest.locate(sys.argv[1])
shape = manifest.read(teacher).model
names = ("hidden", "heads", "kv_heads", "ffn")
student = replace(shape, head_dim=64, **{name: getattr(shape, name) * 3 // 4 for name in names})
sizes = vars(Scores.zeros(shape, torch.device("cpu")))
scores = Scores(**{name: torch.rand_like(value) for name, value in sizes.items()})
wanted = plan.make(shape, student, scores, "position")
Path(sys.argv[2]).mkdir()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
apply(teacher, wanted, Path(sys.argv[2]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
launch.leave()
"""


def run(*words: object) -> str:
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_memory_stays_near_the_largest_tensors(tmp_path: Path) -> None:
    nbytes = convert.make(tmp_path / "hf", layers=8, hidden=2048, vocab=16000)
    run("tools/convert_hf.py", "import", "--hf", tmp_path / "hf", "--out", tmp_path / "run")
    extra = int(run("-c", CUT, tmp_path / "run", tmp_path / "out").split()[-1])
    assert nbytes > 700e6 and extra < 0.3 * nbytes, f"{extra / 1e6:.0f} MB beside {nbytes / 1e6:.0f} MB of weights"
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert 0.5 * nbytes < written < 0.7 * nbytes
