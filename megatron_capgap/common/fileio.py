"""Atomic writes of files and folders."""

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file atomically; its content is on disk before it becomes visible."""
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    _sync_folder(path.parent)


def put_in_place(staged: Path, final: Path) -> None:
    """Renames a completely written folder to its final name, replacing an existing folder; both are on one file
    system."""
    replaced = final.with_name(f".{final.name}.replaced.incomplete")
    if final.exists():
        os.replace(final, replaced)
    os.replace(staged, final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that renames are persisted in order."""
    names = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(names)
    finally:
        os.close(names)
