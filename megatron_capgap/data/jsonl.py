"""Reads files of JSON lines, compressed or not, and makes lines of JSON from files of other types."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.data.file_kinds import START_BYTES, begins_with_json, has_json_values, kind_of_bytes, kind_of_lines
from megatron_capgap.data.inputs import TEXT, base_name, size_of
from megatron_capgap.data.json_values import json_values
from megatron_capgap.data.plain_text import documents_of_text
from megatron_capgap.data.tables import HUB, kind_of_table, rows_of_file, rows_of_hub
from megatron_capgap.data.zstd import open_zstd

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PACKED = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x5d\x00\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": open_zstd,
}


class Block(NamedTuple):
    """Consecutive lines, records, rows or documents of one file.

    Attributes:
        file: the file they come from.
        line: number of the first line in the file, from 1.
        number: number of the first line over all files, from 0.
        lines: the lines as bytes.
        consumed: bytes read from disk so far, over all files.
        unit: what is numbered where it is not a line: record, row or document.
    """

    file: str
    line: int
    number: int
    lines: list[bytes]
    consumed: int
    unit: str = ""

    def place(self, offset: int) -> str:
        """Where line `offset` of the block is: FILE:LINE, or FILE: row N."""
        number = self.line + offset
        return f"{self.file}: {self.unit} {number}" if self.unit else f"{self.file}:{number}"


class _Part(NamedTuple):
    """Consecutive lines of one file; `consumed` counts within it."""

    lines: list[bytes]
    consumed: int
    unit: str = ""


def read_blocks(
    files: list[str], plain: bool = False, key: str | None = None, documents: str | None = None
) -> Iterator[Block]:
    """Yields the lines of all files in order, about a megabyte at a time. What a file is, its content tells: gzip,
    bzip2, xz and zstd are decompressed, a byte order mark is removed, and from JSON that is not one value per line,
    parquet, Arrow and plain text, lines of JSON are made.

    Args:
        files: file names, or names of datasets of the Hub.
        plain: whether to yield the lines of text files as they are.
        key: the key of the text; only this column of a table is read. None: all columns.
        documents: `file`, `line` or `blank-line`: text files are plain text, and what one document is. None: text files
            are JSON, except those whose name ends in .txt, which are one document each if they are not.

    Raises:
        UserError: a file is damaged, or of another type.
    """
    number = consumed = 0
    for file in files:
        line = 1
        for part in _parts(file, plain, key, documents):
            yield Block(file, line, number, part.lines, consumed + part.consumed, part.unit)
            line += len(part.lines)
            number += len(part.lines)
        consumed += size_of(file)


def _parts(file: str, plain: bool, key: str | None, documents: str | None) -> Iterator[_Part]:
    if file.startswith(HUB):
        yield from (_Part(rows.lines, 0, "row") for rows in rows_of_hub(file, key))
        return
    with open(file, "rb") as raw:
        if kind := kind_of_table(_start(raw)):
            for rows in rows_of_file(file, raw, kind, key):
                yield _Part(rows.lines, int(rows.read * size_of(file)), "row")
            return
        read = 0
        try:
            stream = _unpacked(file, raw)
            for part in _of_text(file, stream, raw, plain, key, documents):
                yield part
                read += len(part.lines)
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise _damaged(file, read, error) from None
        except OSError as error:
            if not _is_of_content(error):
                raise
            raise _damaged(file, read, error) from None


def _of_text(
    file: str, stream: IO[bytes], raw: IO[bytes], plain: bool, key: str | None, documents: str | None
) -> Iterator[_Part]:
    """The parts of a text file; `raw` is the file on disk, of which `stream` is the content."""
    first = stream.readlines(_BLOCK_BYTES)
    if first:
        first[0] = first[0].removeprefix(_BOM)
    blocks: Iterator[list[bytes]] = chain([first], iter(lambda: stream.readlines(_BLOCK_BYTES), []))
    if plain or not first:
        lines, unit = blocks, ""
    elif documents or (base_name(file).endswith(TEXT) and not begins_with_json(first)):
        lines, unit = documents_of_text(file, blocks, documents or "file", key or "text"), "document"
    elif has_json_values(first):
        lines, unit = _of_values(file, blocks), "record"
    elif what := kind_of_lines(file, first):
        raise UserError(f"{file}: is {what}")
    else:
        lines, unit = blocks, ""
    for some in lines:
        if some:
            yield _Part(some, raw.tell(), unit)


def _of_values(file: str, blocks: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
    """Lines of JSON, one per value of a text that has them otherwise."""
    decode = getincrementaldecoder("utf-8")()
    read, lines, size = 0, [], 0
    try:
        for value in json_values(decode.decode(b"".join(block)) for block in blocks):
            lines.append(json.dumps(value).encode())
            read, size = read + 1, size + len(lines[-1])
            if size > _BLOCK_BYTES:
                yield lines
                lines, size = [], 0
    except UnicodeDecodeError:
        raise UserError(
            f"{file}: not UTF-8 after record {read}: convert it, as with iconv -f LATIN1 -t UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else in_one_line(error)
        raise UserError(f"{file}: record {read + 1} is not JSON ({reason}): fix or remove it") from None
    yield lines


def _damaged(file: str, read: int, error: Exception) -> UserError:
    return UserError(f"{file} is damaged after line {read} ({error}): copy it again")


def _is_of_content(error: OSError) -> bool:
    """Whether a decompressor raised it: errors of the disk have a number."""
    return error.errno is None


def check_files(files: list[str], key: str | None = None, documents: str | None = None) -> None:
    """Checks the first block of each file; the arguments are those of `read_blocks`.

    Raises:
        UserError: a file is damaged there, or of another type.
    """
    for file in files:
        next(read_blocks([file], key=key, documents=documents), None)


def _unpacked(file: str, raw: IO[bytes]) -> IO[bytes]:
    """A stream of the file's decompressed content, at position 0."""
    start = _start(raw)
    unpack = next((unpack for magic, unpack in _PACKED.items() if start.startswith(magic)), None)
    if unpack is None:
        if what := kind_of_bytes(start):
            raise UserError(f"{file}: is {what}")
        return raw
    stream: IO[bytes] = unpack(raw, "rb")  # type: ignore[operator]
    try:
        start = _start(stream)
    except OSError as error:  # raised by bz2 and gzip without a file name
        raise UserError(f"{file} is damaged after line 0 ({error}): copy it again") from None
    if any(map(start.startswith, _PACKED)):
        raise UserError(f"{file}: is compressed twice: decompress it once")
    if what := kind_of_bytes(start):
        raise UserError(f"{file}: is compressed, and its content is {what}")
    return stream


def _start(stream: IO[bytes]) -> bytes:
    start = stream.read(START_BYTES)
    stream.seek(0)
    return start


def find(path: str, wanted: str) -> Path:
    """Returns the path of an input file.

    Args:
        path: the file.
        wanted: description of the expected file, for messages.

    Raises:
        UserError: the path does not exist, or is not a file.
    """
    file = Path(path)
    if not file.is_file():
        kinds = {"a folder": file.is_dir, "a pipe": file.is_fifo, "a socket": file.is_socket}
        kinds |= {"a device": lambda: file.is_char_device() or file.is_block_device()}
        what = next((f"is {kind}, not a file" for kind, holds in kinds.items() if holds()), "no such file")
        raise UserError(f"{path}: {what}; give {wanted}")
    return file


class JsonLine(NamedTuple):
    """One decoded line."""

    place: str
    """FILE:LINE."""
    content: Any


def json_lines(path: str) -> Iterator[JsonLine]:
    """Yields the decoded lines of a file; empty lines are skipped.

    Raises:
        UserError: a line is not JSON in UTF-8, or has an unpaired surrogate; names the line.
    """
    for block in read_blocks([path]):
        for offset, line in enumerate(block.lines):
            if line.strip():
                place = block.place(offset)
                yield JsonLine(place, _content(place, line))


def _content(place: str, line: bytes) -> Any:
    try:
        content = content_of(line)
    except ValueError as problem:
        kind, detail, fix = problem.args
        raise UserError(f"{place}: {kind}{detail and f' ({detail})'}; {fix}") from None
    try:
        if b"\\u" in line:  # an unpaired surrogate needs an escape
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: has an unpaired surrogate, which is not a character; fix the line") from None
    except RecursionError:
        raise UserError(f"{place}: is nested too deeply; fix or remove the line") from None
    return content


def content_of(line: bytes) -> Any:
    """Decodes a line of JSON.

    Raises:
        ValueError: (kind, detail or "", fix) of the error.
    """
    line = line.removeprefix(_BOM)  # a byte order mark within a file comes from concatenated files
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        fix = "fix or remove the line" if b"\0" in line else "convert the file, as with iconv -f LATIN1 -t UTF-8"
        raise ValueError("not UTF-8", place, fix) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at column {error.colno}"
        if "\0" in text:
            detail = f"a NUL byte at column {text.index(chr(0)) + 1}, as in an incompletely written file"
        raise ValueError("not JSON", detail, "fix or remove the line") from None
    except RecursionError:
        raise ValueError("is nested too deeply", "", "fix or remove the line") from None
    except ValueError:
        detail = f"an integer of more than {sys.get_int_max_str_digits()} digits"
        raise ValueError("not JSON", detail, "fix or remove the line") from None
