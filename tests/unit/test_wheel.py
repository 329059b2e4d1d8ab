"""The wheel: what is in it and what it says of itself."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import megatron_capgap
from tests.support.processes import ROOT, environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the tracked files, built by the setuptools of this environment."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "megatron_capgap"):
        (clone / name).symlink_to(ROOT / name)
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(clone)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    assert file.name == f"megatron_capgap-{megatron_capgap.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(file)


def test_it_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "megatron_capgap"
    assert names == {f"megatron_capgap/{file.relative_to(package)}" for file in package.rglob("*.py")} | {
        "megatron_capgap/py.typed"
    }


def test_it_brings_all_files_that_the_package_has() -> None:
    """A file that is read at run time would have to be named in package_data."""
    others = [file for file in (ROOT / "megatron_capgap").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert {file.name for file in others if file.suffix != ".py"} == {"py.typed"}


def test_it_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (info,) = {Path(name).parts[0] for name in wheel.namelist() if name.split("/")[0].endswith(".dist-info")}
    said = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert (said["Name"], said["Version"]) == ("megatron_capgap", megatron_capgap.__version__)
    assert said["License"] == "Apache-2.0" and "Typing :: Typed" in said.get_all("Classifier", [])
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    assert said.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2311.07052"]
    assert str(said.get_payload()).startswith("# megatron_capgap\n")
    assert "capgap = megatron_capgap.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
