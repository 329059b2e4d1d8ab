"""Where Transformer Engine's Python files lie on a machine without its compiled part.

They have a folder of their own beside the other packages, which `install` puts on the path when it is asked to:
Megatron-Core imports whatever `transformer_engine` it finds, and without the stand-in that import ends in an error.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path

VERSION = "2.20.2"
"""The release that tools/install_transformer_engine_cpu.py fetches; any 2.20.x has the same extension functions, and no
other minor release is stood in for: they differ in quantisers' fields, in enumerations and in a few bits."""


def folder() -> Path:
    """The folder that holds `transformer_engine` and its metadata, whether or not it is there."""
    return Path(sysconfig.get_path("purelib")) / "transformer_engine_for_cpu"


def installed() -> tuple[Path, str] | None:
    """The folder of the `transformer_engine` to use and its version; None where there is none.

    A `transformer_engine` on the path is taken before ours: it is a build for GPUs, whose Python files are the same.
    """
    spec = importlib.util.find_spec("transformer_engine")
    place = Path(spec.origin).parents[1] if spec is not None and spec.origin else folder()
    if not (place / "transformer_engine" / "pytorch" / "__init__.py").is_file():
        return None
    # importlib.metadata would search the whole path, on which this folder need not be.
    found = [re.match(r"transformer_engine-(.+)\.dist-info$", entry.name) for entry in place.iterdir()]
    versions = [match[1] for match in found if match]
    return place, versions[0] if versions else "unknown"
