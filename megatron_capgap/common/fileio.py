"""Files and folders that are there whole or not at all."""

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file in one step, on disk before it is visible."""
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    _sync_folder(path.parent)


def put_in_place(staged: Path, final: Path) -> None:
    """Gives a completely written folder its name, in the place of one that has it; both on one file system."""
    replaced = final.with_name(f".{final.name}.replaced.incomplete")
    if final.exists():
        os.replace(final, replaced)
    os.replace(staged, final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk, so that after a power cut they follow the order they were given in."""
    names = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(names)
    finally:
        os.close(names)
