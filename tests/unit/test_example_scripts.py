"""The examples' scripts: what they need of one another is looked for before anything is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT


@pytest.mark.parametrize(("example", "first"), [("evaluation", "smollm2"), ("fp8_numerics", "quickstart")])
def test_what_must_run_first_is_said_before_the_installation(tmp_path: Path, example: str, first: str) -> None:
    for file in (f"examples/{example}/run.sh", "tools/install.sh"):
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copy(ROOT / file, tmp_path / file)
    # An installation would end with another message: there is no Python to make an environment with.
    variables = {**os.environ, "CAPGAP_VENV": str(tmp_path / "environment"), "PATH": str(tmp_path / "bin")}
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    done = subprocess.run(
        ["bash", f"examples/{example}/run.sh"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert f" is not there; bash examples/{first}/run.sh makes it, run that first\n" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "environment").exists()
