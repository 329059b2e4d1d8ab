"""tools/install.sh: which Python it takes, and what it says where there is none. Nothing is installed here."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT

RELEASES = runpy.run_path(str(ROOT / "megatron_capgap/runtime/releases.py"))


def a_python(path: Path, version: str | None, *, suitable: bool = True, ensurepip: bool = True) -> None:
    """Something that answers as a Python of that version would, or that does not start, as pyenv's shims may not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = (
        'case "$*" in\n'
        f"  *platform*) echo {version};;\n  *releases.py) exit {0 if suitable else 1};;\n"
        f"  *ensurepip*) exit {0 if ensurepip else 1};;\n  *venv*) exit 7;;\nesac\n"
    )
    path.write_text("#!/bin/bash\n" + (answers if version else "echo shim: command not found >&2; exit 127\n"))
    path.chmod(0o755)


def install(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Sources the script where no Python is to be found but those below `folder`."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for tool in ("bash", "dirname", "cat", "sha256sum", "cut"):
        (folder / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder), "CAPGAP_VENV": str(folder / "made"), **variables}
    words = ["bash", "-c", f"source {ROOT}/tools/install.sh quickstart"]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_none_at_all_is_one_line(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("install: no Python 3.10, 3.11, 3.12 or 3.13 found (none is there); install one")
    assert done.stderr.count("\n") == 1


def test_each_that_will_not_do_is_named_with_its_reason(tmp_path: Path) -> None:
    a_python(tmp_path / "bin/python3", "3.9.2", suitable=False)
    a_python(tmp_path / "bin/python3.13", None)
    a_python(tmp_path / "bin/python3.11", "3.11.2", ensurepip=False)
    done = install(tmp_path)
    assert done.returncode == 2 and not (tmp_path / "made").exists()
    tried = "found (python3 is 3.9.2, python3.13 does not start, python3.11 has no ensurepip (on Debian: apt install"
    assert tried in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "place", [".pyenv/versions/3.12.1/bin/python3.12", ".local/share/uv/python/cpython-3.12.8-linux/bin/python3.12"]
)
def test_those_of_pyenv_and_uv_are_found_where_the_path_has_only_a_shim(tmp_path: Path, place: str) -> None:
    a_python(tmp_path / "bin/python3", "3.14.0", suitable=False)
    a_python(tmp_path / "bin/python3.12", None)
    a_python(tmp_path / place, "3.12.1")
    done = install(tmp_path)
    assert done.stdout == f"== making {tmp_path}/made with {tmp_path}/{place}\n", done.stderr
    assert done.returncode == 7  # of what stands for `-m venv`


def test_python3_is_taken_before_newer_ones(tmp_path: Path) -> None:
    a_python(tmp_path / "bin/python3", "3.11.7")
    a_python(tmp_path / "bin/python3.13", "3.13.0")
    assert install(tmp_path).stdout == f"== making {tmp_path}/made with python3\n"
    assert install(tmp_path / "again", PYTHON=str(tmp_path / "bin/python3.13")).stdout.endswith("bin/python3.13\n")


def test_a_named_python_that_will_not_do_is_one_line(tmp_path: Path) -> None:
    a_python(tmp_path / "bin/python3.9", "3.9.2", suitable=False)
    done = install(tmp_path, PYTHON="python3.9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "install: PYTHON=python3.9 is 3.9.2; name a Python 3.10, 3.11, 3.12 or 3.13\n"


def test_an_environment_of_another_python_is_not_taken_for_the_named_one(tmp_path: Path) -> None:
    for path, version in (("made/bin/python", "3 11"), ("bin/python3.12", "3 12")):
        a_python(tmp_path / path, "3.12.1")
        (tmp_path / path).write_text(f"#!/bin/bash\necho {version}\n")
    done = install(tmp_path, PYTHON="python3.12")
    assert done.returncode == 2
    assert done.stderr.startswith(f"install: {tmp_path}/made was not made with PYTHON=python3.12; remove it")


def test_the_words_name_the_releases_of_the_one_place() -> None:
    """Sentences for people are not made of the bounds; they must say the same."""
    (low, high), names = RELEASES["PYTHON"], re.compile(r"3\.10, 3\.11, 3\.12 (?:or|and) 3\.13|3\.10 to 3\.13")
    assert [f"{low[0]}.{minor}" for minor in range(low[1], high[1])] == ["3.10", "3.11", "3.12", "3.13"]
    for file in ("README.md", "tools/install.sh", "examples/quickstart/run.sh"):
        text = (ROOT / file).read_text()
        assert names.search(text), file
        assert not re.search(r"Python 3\.10 (?:or|and) 3\.11|megatron-core` 0\.16 comes", text), file
