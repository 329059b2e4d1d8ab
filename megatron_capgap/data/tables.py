"""Rows of tables: parquet files, Arrow files and streams, and datasets of the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from megatron_capgap.common.errors import UserError, in_one_line

if TYPE_CHECKING:
    import pyarrow

HUB = "hf:"
"""Begins the name of a dataset of the Hub."""
_KINDS = {b"PAR1": "parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow stream"}
_ROWS = 1000  # in a batch
_SHOWN = 20  # columns in a message


class Rows(NamedTuple):
    """Consecutive rows.

    Attributes:
        lines: each row as one line of JSON.
        read: share of the file that is read, from 0 to 1.
    """

    lines: list[bytes]
    read: float


def kind_of_table(start: bytes) -> str | None:
    """parquet, Arrow or Arrow stream by the first bytes of a file; None for other files."""
    return next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), None)


def rows_of_file(file: str, stream: IO[bytes], kind: str, column: str | None) -> Iterator[Rows]:
    """Yields the rows of a table.

    Args:
        file: its name, for messages.
        stream: the open file.
        kind: of `kind_of_table`.
        column: the only column to read; None reads all.

    Raises:
        UserError: the file is damaged, lacks the column, or pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{file}: is a file in {kind} format, which needs pyarrow: pip install pyarrow, or write it as jsonl"
        ) from None
    size = max(1, Path(file).stat().st_size)
    try:
        if kind == "parquet":
            yield from _parquet(file, stream, column)
            return
        reader = pyarrow.ipc.open_stream(stream) if kind == "Arrow stream" else pyarrow.ipc.open_file(stream)
        _check(file, column, reader.schema.names)
        batches = reader if kind == "Arrow stream" else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            yield from _pieces(batch, column, stream.tell() / size)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: is a damaged file in {kind} format ({in_one_line(error)}): copy it again") from None


def _parquet(file: str, stream: IO[bytes], column: str | None) -> Iterator[Rows]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(stream)
    _check(file, column, table.schema_arrow.names)
    done = 0
    for batch in table.iter_batches(_ROWS, columns=None if column is None else [column]):
        done += batch.num_rows
        yield from _pieces(batch, column, done / max(1, table.metadata.num_rows))


def _check(file: str, column: str | None, names: Sequence[str]) -> None:
    if column is not None and column not in names:
        more = " and more" if len(names) > _SHOWN else ""
        raise UserError(
            f"{file}: has no column {column!r}: its columns are {', '.join(names[:_SHOWN])}{more}; name one of them "
            "with --text-key"
        )


def _pieces(batch: pyarrow.RecordBatch, column: str | None, read: float) -> Iterator[Rows]:
    columns = batch.schema.names if column is None else [column]
    batch = batch.select(columns)
    for start in range(0, batch.num_rows, _ROWS):
        yield Rows([_line(row) for row in batch.slice(start, _ROWS).to_pylist()], read)


def _line(row: Any) -> bytes:
    return json.dumps(row, default=str).encode()


def rows_of_hub(name: str, column: str | None) -> Iterator[Rows]:
    """Yields the rows of a dataset as `datasets` streams it, without a copy on disk.

    Args:
        name: hf:REPOSITORY, hf:REPOSITORY:SPLIT or hf:REPOSITORY:CONFIGURATION:SPLIT; without a split, train. A
            repository may be a folder.
        column: the only column to read; None reads all.

    Raises:
        UserError: there is no such dataset, split or column, no network, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: needs the package datasets: pip install datasets") from None
    repository, _, rest = name.removeprefix(HUB).partition(":")
    configuration, _, split = rest.rpartition(":")
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(repository, configuration or None, split=split or "train", streaming=True)
        first = next(iter(found), None)
        if first is None:
            return
        _check(name, column, list(first))
        rows = iter(found if column is None else found.select_columns([column]))
        while batch := list(islice(rows, _ROWS)):
            yield Rows([_line(row) for row in batch], 0.0)
    except UserError:
        raise
    except Exception as error:  # datasets, its file systems and its HTTP clients each raise types of their own
        raise UserError(
            f"{name}: cannot be read ({type(error).__name__}: {in_one_line(error)}); write {HUB}REPOSITORY:SPLIT or "
            f"{HUB}REPOSITORY:CONFIGURATION:SPLIT, or give files"
        ) from None
