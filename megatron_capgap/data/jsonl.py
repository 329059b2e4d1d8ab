"""Files of JSON lines: packed or not, and what they are when they are something else."""

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
        number: number of the first line, over all files, from 0.
        lines: the lines, undecoded.
        consumed: bytes read so far, on disk and over all files.
    """

    file: str
    line: int
    number: int
    lines: list[bytes]
    consumed: int


def read_blocks(files: list[str], plain: bool = False) -> Iterator[Block]:
    """The lines of all files in order, about a megabyte at a time; gzip, bzip2 and xz are unpacked, whatever a file is
    called, and a byte order mark is left out.

    Args:
        files: their names.
        plain: they hold text, not JSON lines.

    Raises:
        UserError: a packed file is damaged, or a file is of another kind.
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
    """Looks at the beginning of each file of JSON lines.

    Raises:
        UserError: one is damaged there, or of another kind.
    """
    for file in files:
        next(read_blocks([file]), None)


def _unpacked(file: str, raw: IO[bytes]) -> IO[bytes]:
    """The file's content, at its beginning."""
    start = _start(raw)
    unpack = next((unpack for magic, unpack in _PACKED.items() if start.startswith(magic)), None)
    if unpack is None:
        if what := kind_of_bytes(start):
            raise UserError(f"{file}: is {what}")
        return raw
    stream: IO[bytes] = unpack(raw, "rb")  # type: ignore[operator]
    try:
        start = _start(stream)
    except OSError as error:  # bzip2's and gzip's own, which name no file
        raise UserError(f"{file} is damaged after line 0 ({error}): copy it again") from None
    if any(map(start.startswith, _PACKED)):
        raise UserError(f"{file}: is packed twice: unpack it once")
    if what := kind_of_bytes(start):
        raise UserError(f"{file}: is packed, and what it holds is {what}")
    return stream


def _start(stream: IO[bytes]) -> bytes:
    start = stream.read(START_BYTES)
    stream.seek(0)
    return start


def find(path: str, wanted: str) -> Path:
    """A file to be read.

    Raises:
        UserError: it is not there, or no file.
    """
    file = Path(path)
    if not file.is_file():
        kinds = {"a folder": file.is_dir, "a pipe": file.is_fifo, "a socket": file.is_socket}
        kinds |= {"a device": lambda: file.is_char_device() or file.is_block_device()}
        what = next((f"is {kind}, no file" for kind, holds in kinds.items() if holds()), "no such file")
        raise UserError(f"{path}: {what}; give {wanted}")
    return file


class Row(NamedTuple):
    """What one line holds."""

    place: str
    """FILE:LINE."""
    content: Any


def rows(path: str) -> Iterator[Row]:
    """What the lines of a file hold; empty ones are left out.

    Raises:
        UserError: a line is no JSON in UTF-8, or holds half of a character; with its number.
    """
    for block in read_blocks([path]):
        for number, line in enumerate(block.lines, start=block.line):
            if line.strip():
                yield Row(f"{path}:{number}", _content(f"{path}:{number}", line))


def _content(place: str, line: bytes) -> Any:
    try:
        content = content_of(line)
    except ValueError as problem:
        kind, detail, fix = problem.args
        raise UserError(f"{place}: {kind}{detail and f' ({detail})'}; {fix}") from None
    try:
        if b"\\u" in line:  # only so can half of a character be written
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: holds half of a surrogate pair, which is no character; mend the line") from None
    except RecursionError:
        raise UserError(f"{place}: is nested too deep to be read; mend or remove the line") from None
    return content


def content_of(line: bytes) -> Any:
    """What a line of JSON holds.

    Raises:
        ValueError: (kind, detail or "", fix) of what is wrong with the line.
    """
    line = line.removeprefix(_BOM)  # one in the middle is where files were put together
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        fix = "mend or remove the line" if b"\0" in line else "convert the file, as with iconv -f LATIN1 -t UTF-8"
        raise ValueError("not UTF-8", place, fix) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at column {error.colno}"
        if "\0" in text:
            detail = f"a NUL byte at column {text.index(chr(0)) + 1}, as where a file was not written to its end"
        raise ValueError("not JSON", detail, "mend or remove the line") from None
    except RecursionError:
        raise ValueError("is nested too deep to be read", "", "mend or remove the line") from None
    except ValueError:
        detail = f"a number of more than {sys.get_int_max_str_digits()} digits"
        raise ValueError("not JSON", detail, "mend or remove the line") from None
