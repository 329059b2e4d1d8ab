"""Installing the CPU's stand-in for Transformer Engine's extension: when, over what, and what it leaves alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_capgap.common.errors import UserError
from megatron_capgap.devices.transformer_engine_cpu import files, install
from tests.support.engine import needs_files
from tests.support.processes import environment


def fake_files(folder: Path, version: str) -> None:
    (folder / "transformer_engine" / "pytorch").mkdir(parents=True)
    (folder / "transformer_engine" / "pytorch" / "__init__.py").touch()
    (folder / f"transformer_engine-{version}.dist-info").mkdir()


def test_missing_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "folder", lambda: tmp_path)
    with pytest.raises(
        UserError, match=r"^precision\.engine: .*not installed; run tools/install_transformer_engine_cpu"
    ):
        install()


@pytest.mark.parametrize("version", ["2.11.0", "2.21.0", "3.20.2"])
def test_another_release_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    fake_files(tmp_path, version)
    monkeypatch.setattr(files, "folder", lambda: tmp_path)
    with pytest.raises(
        UserError, match=rf"transformer_engine {version} in .* is not 2\.20\.2, .*remove it and run tools/"
    ):
        install()


PROGRAM = """
import importlib.util, json, sys
found = {"before": importlib.util.find_spec("transformer_engine") is not None}
from megatron_capgap.devices import cpu, transformer_engine_cpu
transformer_engine_cpu.install()
import torch
names = [dict(vars(place)) for place in (torch.cuda, torch.distributed, torch.Tensor)]
transformer_engine_cpu.install()
found["again"] = names == [dict(vars(place)) for place in (torch.cuda, torch.distributed, torch.Tensor)]
cpu.prepare()
import transformer_engine, transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
layer = te.Linear(32, 32, device="cpu")
with te.fp8_autocast(enabled=True):
    layer(torch.ones(32, 32))
found |= {"have": HAVE_TE, "torch's optimizer": USING_PYTORCH_OPTIMIZER, "version": transformer_engine.__version__}
found |= {"cuda": torch.cuda.is_available() or torch.ones(1).is_cuda}
versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("triton", "onnx", "onnxscript")}
found |= {"stand-ins": [name for name, version in versions.items() if version == "0"]}
print(json.dumps(found))
"""


@needs_files
def test_a_process_before_and_after() -> None:
    """Without install() nobody sees Transformer Engine, and with it torch does not claim to have a GPU."""
    words = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "before": False,
        "again": True,
        "have": True,
        "torch's optimizer": True,
        "version": files.VERSION,
        "cuda": False,
        "stand-ins": [],
    }


@needs_files
def test_too_late_is_told() -> None:
    program = "import megatron.core.fp8_utils\nfrom megatron_capgap.devices.transformer_engine_cpu import install\n"
    words = [sys.executable, "-W", "ignore", "-c", f"{program}install()"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "looked for Transformer Engine before install() was called" in done.stderr
