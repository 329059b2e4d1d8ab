"""The files that a list of files, folders, patterns and datasets stands for."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.tables import HUB

PACKED = (".gz", ".bz2", ".xz", ".lzma", ".zst")
"""Endings of compressed files."""
TEXT = (".txt", ".text")
_ENDINGS = (".jsonl", ".json", ".ndjson", *TEXT, ".parquet", ".arrow")


def expand(inputs: Sequence[str]) -> list[str]:
    """Returns the files to read, in order.

    Args:
        inputs: files; folders, whose files with a known ending are taken in the order of their names, those in
            subfolders included; folders that `datasets.save_to_disk` wrote; patterns with *, ? or [...]; names of
            datasets, which begin with hf:.

    Raises:
        UserError: an input does not exist, or has no file.
    """
    return [file for given in inputs for file in _files_of(given)]


def size_of(file: str) -> int:
    """Bytes on disk; 0 for a dataset of the Hub."""
    return 0 if file.startswith(HUB) else Path(file).stat().st_size


def base_name(file: str) -> str:
    """The name without its folder and without the ending of a compression, in small letters."""
    name = Path(file).name.lower()
    return next((name.removesuffix(ending) for ending in PACKED if name.endswith(ending)), name)


def _files_of(given: str) -> list[str]:
    if given.startswith(HUB):
        return [given]
    path = Path(given)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return [given]
    if path.exists():
        raise UserError(f"--input {given} is not a file: pass files, folders, patterns or {HUB}REPOSITORY")
    if not glob.has_magic(given):
        raise UserError(f"--input {given} does not exist: pass files, folders, patterns or {HUB}REPOSITORY")
    found = sorted(filter(lambda name: Path(name).is_file(), glob.glob(given, recursive=True)), key=_natural)
    if not found:
        raise UserError(f"--input {given}: no file matches; see what is there with ls")
    return found


def _of_folder(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        names = ", ".join(str(folder / split) for split in splits)
        raise UserError(f"--input {folder} holds the splits of a dataset: choose among {names}")
    if (folder / "state.json").is_file():
        return _of_saved_dataset(folder)
    found = [
        file
        for file in folder.rglob("*")
        if file.is_file()
        and base_name(str(file)).endswith(_ENDINGS)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not found:
        raise UserError(
            f"--input {folder}: no file in this folder ends in {', '.join(_ENDINGS)}, or one of these with "
            f"{', '.join(PACKED)}: name the files"
        )
    return [str(file) for file in sorted(found, key=_natural)]


def _of_saved_dataset(folder: Path) -> list[str]:
    """The Arrow files of a folder of `datasets.save_to_disk`, in the order of its state.json."""
    state = json.loads((folder / "state.json").read_text())
    files = [str(folder / entry["filename"]) for entry in state.get("_data_files", [])]
    if state.get("_indices_files"):
        raise UserError(
            f"--input {folder} stores a selection of rows beside the rows: save it again after "
            "dataset.flatten_indices()"
        )
    missing = next((file for file in files if not Path(file).is_file()), None)
    if missing or not files:
        raise UserError(f"--input {folder}: {missing or 'its data file'} does not exist: copy the whole folder again")
    return files


def _natural(name: str | Path) -> list[tuple[int, str]]:
    """Sorts part-2 before part-10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", str(name))]
