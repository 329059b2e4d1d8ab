"""Installs Transformer Engine's Python files without its GPU libraries, for `engine: transformer_engine` on a CPU.

    python tools/install_transformer_engine_cpu.py

The files come from its Python package (under 1 MB) and are installed into a separate folder beside this Python's other
packages. Does nothing if they are installed already, or if a GPU build is.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_capgap.devices.transformer_engine_cpu import files
from tools import wheels


def main() -> int:
    """Installs the files unless they are installed; returns the exit code."""
    found = files.installed()
    if found is not None and (found[0] != files.folder() or found[1] == files.VERSION):
        print(f"transformer_engine {found[1]} is installed in {found[0]}")
        return 0
    package = f"transformer-engine=={files.VERSION}"
    with wheels.opened(package, "--only-binary", ":all:") as archive, tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "files"
        archive.extractall(
            staged, [item for item in archive.namelist() if item.endswith(".py") or ".dist-info/" in item]
        )
        # Moved in one step, so that an interrupted installation leaves no incomplete folder.
        shutil.rmtree(files.folder(), ignore_errors=True)
        shutil.move(staged, files.folder())
    print(f"installed transformer_engine {files.VERSION} (Python files) into {files.folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
