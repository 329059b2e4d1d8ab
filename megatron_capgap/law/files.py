"""Reads files of records: JSON lines, a JSON list, or a table whose first row names the columns.

Nested values are available under dotted names in addition to their own: `{"config": {"seed": 1}}` has `config` and
`config.seed`. This covers W&B runs: the result of `wandb.Api().runs(...)` as a JSON list of `{"config": {...},
"summary": {...}}`, or the table that W&B's own example writes, whose cells contain such dictionaries as text.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DELIMITERS = {".csv": ",", ".tsv": "\t"}


class LawError(ValueError):
    """Invalid records or an invalid grid. The message is one line with place and fix."""


def read_file(path: Path, wanted: Sequence[str]) -> list[tuple[str, dict[str, Any], bool]]:
    """The records of a file as (place, content, whether cells are still text).

    Args:
        path: of the file.
        wanted: names that a record needs, for the error message.

    Raises:
        LawError: the file cannot be read, or contains something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise LawError(f"{path}: cannot be read ({reason}); give a .jsonl, .csv or .tsv file of records") from None
    if path.suffix.lower() in DELIMITERS:
        return [(place, _flat(row, parsed=True), True) for place, row in _rows(path, text)]
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        runs = _json(str(path), text)
        listed = [(f"{path}: run {number}", run) for number, run in enumerate(runs, 1)]
    else:
        lines = [(f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        listed = [(place, _json(place, line)) for place, line in lines]
    for place, content in listed:
        if not isinstance(content, dict):
            raise LawError(f"{place}: {str(content)[:40]} is no record; expected an object with {', '.join(wanted)}")
    return [(place, _flat(content), False) for place, content in listed]


def _flat(content: Mapping[str, Any], parsed: bool = False) -> dict[str, Any]:
    """Adds nested values under dotted names; with `parsed`, dictionaries may also be given as text."""
    found = dict(content)
    for name, value in content.items():
        if parsed and isinstance(value, str) and value.startswith("{"):
            value = _dictionary(value)
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": each for key, each in _flat(value).items()}
    return found


def _dictionary(cell: str) -> Any:
    """Parses a dictionary in JSON or Python notation; returns other text unchanged."""
    # Python has no literal for nan or inf; as a non-finite number it is refused later, with its line.
    finite = re.sub(r"(?<=[ :,\[-])(nan|inf)(?=[,}\]])", "1e999", cell)
    for convert, text in ((json.loads, cell), (ast.literal_eval, finite)):
        try:
            return convert(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return cell


def _rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a table, by column name; empty cells are omitted."""
    rows = csv.reader(text.splitlines(keepends=True), delimiter=DELIMITERS[path.suffix.lower()], strict=True)
    found, columns = [], None
    try:
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if columns is None:
                columns = row
                if twice := sorted({name for name in row if row.count(name) > 1 and name}):
                    raise LawError(f"{place}: two columns are called {twice[0]!r}; rename or remove one")
                if len(row) == 1 and ";" in row[0]:
                    raise LawError(f"{place}: columns are separated by ;, not by commas; save the table with commas")
            elif len(row) > len(columns):
                raise LawError(f"{place}: {len(row)} cells under {len(columns)} columns; quote cells that hold commas")
            elif any(row):
                cells = zip(columns, row, strict=False)
                found.append((place, {name: cell for name, cell in cells if cell != ""}))
    except csv.Error as error:
        raise LawError(f"{path}:{rows.line_num}: not a table ({error}); quote cells that hold quotes") from None
    return found


def _json(place: str, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LawError(f"{place}: {twice!r} is given twice; keep one")
        return content

    try:
        return json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        if isinstance(error, LawError):
            raise
        raise LawError(f"{place}: not JSON ({error}); a .jsonl file has one complete record per line") from None
