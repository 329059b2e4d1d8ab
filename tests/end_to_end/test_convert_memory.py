"""No process holds a model while it converts one, or cuts a smaller one out of it: resident sets of 700 MB models."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import convert
from tests.support.processes import ROOT, environment

pytestmark = pytest.mark.memory
# Three quarters of every width, by random scores; prints what `apply` by itself adds to the peak.
CUT = """
import sys
from dataclasses import replace
from pathlib import Path
from megatron_capgap.distributed import process_group
from megatron_capgap.distributed.environment import read_environment
from megatron_capgap.devices import choose
from megatron_capgap.devices.cpu import peak_resident_bytes
device = choose("cpu", 0)
process_group.init_process_group(read_environment({}), device, 60)
import torch
from megatron_capgap.checkpoint import metadata
from megatron_capgap.checkpoint import run_directory
from megatron_capgap.pruning import prune_plan
from megatron_capgap.pruning.apply import apply
from megatron_capgap.pruning.importance_scores import Scores
teacher = run_directory.locate(sys.argv[1])
shape = metadata.read(teacher).model
names = ("hidden", "heads", "kv_heads", "ffn")
student = replace(shape, head_dim=64, **{name: getattr(shape, name) * 3 // 4 for name in names})
sizes = vars(Scores.zeros(shape, torch.device("cpu")))
scores = Scores(**{name: torch.rand_like(value) for name, value in sizes.items()})
wanted = prune_plan.make(shape, student, scores, "position")
Path(sys.argv[2]).mkdir()
before = peak_resident_bytes()
apply(teacher, wanted, Path(sys.argv[2]))
print(peak_resident_bytes() - before)
process_group.destroy_process_group()
"""


@dataclass(frozen=True)
class Imported:
    """A large model as a run, and how it came in."""

    run_dir: Path
    nbytes: int
    """Of its weights."""
    base: int
    """Bytes that the import of a tiny model needs at the most."""
    peak: int
    """Bytes that its own import needed at the most."""


def last_number(program: str, *words: object) -> int:
    """What a program says last, run in a process of its own, as a user starts it."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, words)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    folder = tmp_path_factory.mktemp("large")
    convert.make(folder / "tiny", layers=2, hidden=128, vocab=300)
    nbytes = convert.make(folder / "hf", layers=8, hidden=2048, vocab=16000)
    assert nbytes > 700e6
    base = last_number(convert.CALL, "import", "--hf", folder / "tiny", "--out", folder / "tiny_run")
    peak = last_number(convert.CALL, "import", "--hf", folder / "hf", "--out", folder / "run")
    return Imported(folder / "run", nbytes, base, peak)


def assert_small(extra: int, imported: Imported, share: float) -> None:
    nbytes = imported.nbytes
    assert extra < share * nbytes, f"{extra / 1e6:.0f} MB beside {nbytes / 1e6:.0f} MB of weights"


@pytest.mark.slow("a model large enough that its memory stands out from the interpreter's")
def test_converting_stays_near_the_largest_tensors(imported: Imported, tmp_path: Path) -> None:
    assert_small(imported.peak - imported.base, imported, 0.25)
    peak = last_number(convert.CALL, "export", "--checkpoint", imported.run_dir, "--out", tmp_path / "back")
    assert_small(peak - imported.base, imported, 0.25)
    assert (tmp_path / "back/model.safetensors").stat().st_size >= imported.nbytes - 100_000


@pytest.mark.slow("a model large enough that its memory stands out from the interpreter's")
def test_cutting_stays_near_the_largest_tensors(imported: Imported, tmp_path: Path) -> None:
    assert_small(last_number(CUT, imported.run_dir, tmp_path / "out"), imported, 0.3)
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert 0.5 * imported.nbytes < written < 0.7 * imported.nbytes
