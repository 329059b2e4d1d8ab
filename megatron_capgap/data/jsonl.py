"""Files of JSON lines: packed or not, and what they are when they are something else."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_capgap.config.errors import UserError, in_one_line

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_OTHERS = {
    b"PAR1": "a parquet file: write it as jsonl, as with pandas.read_parquet(FILE).to_json(OUT, orient='records', "
    "lines=True)",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it with zstd -d",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x89HDF": "an HDF5 file: write its texts as jsonl",
    b"ARROW1": "an Arrow file: write it as jsonl, as datasets.Dataset.to_json does",
    b"\xff\xff\xff\xff": "an Arrow stream: write it as jsonl, as datasets.Dataset.to_json does",
    b"\xff\xfe": "text in UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "text in UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
}


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


def read_blocks(files: list[str]) -> Iterator[Block]:
    """The lines of all files in order, about a megabyte at a time; gzip, bzip2 and xz are unpacked, whatever a file is
    called, and a byte order mark is left out.

    Raises:
        UserError: a packed file is damaged, or a file is of another kind.
    """
    number = consumed = 0
    for file in files:
        line = 1
        with open(file, "rb") as raw:
            stream = _unpacked(file, raw)
            try:
                while lines := stream.readlines(_BLOCK_BYTES):
                    if line == 1:
                        lines[0] = lines[0].removeprefix(_BOM)
                        _check_no_array(file, lines)
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


def _unpacked(file: str, raw: IO[bytes]) -> IO[bytes]:
    start = raw.read(8)
    raw.seek(0)
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise UserError(f"{file}: is {what}")
    for magic, unpack in _PACKED.items():
        if start.startswith(magic):
            return unpack(raw, "rb")  # type: ignore[operator]
    return raw


def _check_no_array(file: str, lines: list[bytes]) -> None:
    """One array over all lines is JSON, and no line of it is."""
    first = next((line.strip() for line in lines if line.strip()), b"")
    if not first.startswith(b"["):
        return
    try:
        content = json.loads(first)
    except (ValueError, RecursionError):
        content = None
        if first != b"[" and not first.startswith((b"[{", b"[[")):
            return
    alone = sum(bool(line.strip()) for line in lines) == 1
    if content is None or (alone and content and not _one_conversation(content[0])):
        raise UserError(f"{file}: is one JSON array; write one object a line, as with jq -c '.[]' {file} > lines.jsonl")


def _one_conversation(first: Any) -> bool:
    """Whether an array that begins with this may be the turns of one conversation."""
    keys = {"User", "Assistant", "role", "from", "content", "value"}
    return not isinstance(first, list) and not (isinstance(first, dict) and first and not keys & first.keys())


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
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); convert the file, as "
            "with iconv -f LATIN1 -t UTF-8"
        ) from None
    try:
        content = json.loads(text)
        if "\\u" in text:  # only so can half of a character be written
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: holds half of a surrogate pair, which is no character; mend the line") from None
    except RecursionError:
        raise UserError(f"{place}: is nested too deep to be read; mend or remove the line") from None
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({in_one_line(error)}); mend or remove the line") from None
    return content
