"""Location of Transformer Engine's Python files on a machine without its compiled extension.

They are in their own folder next to the other packages, which `install` adds to the path on request: Megatron-Core
imports any `transformer_engine` it finds, and without the emulation that import fails.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path

VERSION = "2.20.2"
"""The release that tools/install_transformer_engine_cpu.py fetches. Any 2.20.x has the same extension functions. Other
minor releases are not emulated: quantisers' fields, enumerations and a few bits differ."""


def folder() -> Path:
    """The folder for `transformer_engine` and its metadata, whether or not it exists."""
    return Path(sysconfig.get_path("purelib")) / "transformer_engine_for_cpu"


def installed() -> tuple[Path, str] | None:
    """The folder of the `transformer_engine` to use and its version; None if there is none.

    A `transformer_engine` on the path takes precedence: it is a build for GPUs with the same Python files.
    """
    spec = importlib.util.find_spec("transformer_engine")
    place = Path(spec.origin).parents[1] if spec is not None and spec.origin else folder()
    if not (place / "transformer_engine" / "pytorch" / "__init__.py").is_file():
        return None
    # importlib.metadata would search the whole path, which need not contain this folder.
    found = [re.match(r"transformer_engine-(.+)\.dist-info$", entry.name) for entry in place.iterdir()]
    versions = [match[1] for match in found if match]
    return place, versions[0] if versions else "unknown"
