"""Reads files of JSON lines, compressed or not, and reports the type of other files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.file_kinds import START_BYTES, kind_of_bytes, kind_of_lines

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"\x5d\x00\x00": lzma.open}


class Block(NamedTuple):
    """Consecutive lines of one file.

    Attributes:
        file: the file they come from.
        line: number of the first line, from 1.
        number: number of the first line over all files, from 0.
        lines: the lines as bytes.
        consumed: bytes read from disk so far, over all files.
    """

    file: str
    line: int
    number: int
    lines: list[bytes]
    consumed: int


def read_blocks(files: list[str], plain: bool = False) -> Iterator[Block]:
    """Yields the lines of all files in order, about a megabyte at a time; gzip, bzip2 and xz are detected by content
    and decompressed, and a byte order mark is removed.

    Args:
        files: file names.
        plain: whether the files are plain text, not JSON lines.

    Raises:
        UserError: a compressed file is damaged, or a file is of another type.
    """
    number = consumed = 0
    for file in files:
        line = 1
        with open(file, "rb") as raw:
            stream: IO[bytes] = raw
            try:
                stream = _unpacked(file, raw)
                while lines := stream.readlines(_BLOCK_BYTES):
                    if line == 1:
                        lines[0] = lines[0].removeprefix(_BOM)
                        if not plain and (what := kind_of_lines(file, lines)):
                            raise UserError(f"{file}: is {what}")
                    yield Block(file, line, number, lines, consumed + raw.tell())
                    line += len(lines)
                    number += len(lines)
            except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
                raise UserError(f"{file} is damaged after line {line - 1} ({error}): copy it again") from None
            except OSError as error:
                if stream is raw:
                    raise
                raise UserError(f"{file} is damaged after line {line - 1} ({error}): copy it again") from None
        consumed += Path(file).stat().st_size


def check_files(files: list[str]) -> None:
    """Checks the first block of each file of JSON lines.

    Raises:
        UserError: a file is damaged there, or of another type.
    """
    for file in files:
        next(read_blocks([file]), None)


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
        for number, line in enumerate(block.lines, start=block.line):
            if line.strip():
                yield JsonLine(f"{path}:{number}", _content(f"{path}:{number}", line))


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
