"""Detects the type of a file, from its first bytes and its first lines."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

START_BYTES = 1024
"""Bytes of a file that `kind_of_bytes` needs."""
_LINES = 20
_MOST_PARSED = 1 << 23  # bytes: a longer line is the whole file
_KEYS = {"text", "messages", "conversations", "prompt"}
"""Keys of a row, not of a turn."""
_OF_TURNS = {"User", "Assistant", "role", "from", "content", "value"}
_AS_JSONL = "write it as jsonl, as datasets.Dataset.to_json does"
_MAGICS = {
    b"PAR1": "a parquet file: write it as jsonl, as with pandas.read_parquet(FILE).to_json(OUT, orient='records', "
    "lines=True)",
    b"\x04\x22\x4d\x18": "compressed with lz4: decompress it with lz4 -d",
    b"\x02\x21\x4c\x18": "compressed with lz4: decompress it with lz4 -d",
    b"\xff\x06\x00\x00sNaPpY": "compressed with snappy: decompress it",
    b"\x1f\x9d": "compressed with compress: decompress it with uncompress",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it with 7z x",
    b"Rar!\x1a\x07": "a rar archive: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PK\x05\x06": "an empty zip archive: give a file of JSON lines",
    b"\x89HDF": "an HDF5 file: write its texts as jsonl",
    b"\x93NUMPY": "a NumPy array: write its texts as jsonl",
    b"SQLite format 3\x00": "an SQLite database: write its texts as jsonl",
    b"Obj\x01": f"an Avro file: {_AS_JSONL}",
    b"ARROW1": f"an Arrow file: {_AS_JSONL}",
    b"\xff\xff\xff\xff": f"an Arrow stream: {_AS_JSONL}",
    b"FEA1": f"a feather file: {_AS_JSONL}",
    b"MMIDIDX\x00": "the index of a Megatron dataset, whose text is already tokenized: give the original text",
    b"%PDF-": "a PDF document: write its texts as jsonl",
    b"\x89PNG": "an image: give a file of JSON lines",
    b"\xff\xd8\xff": "an image: give a file of JSON lines",
    b"\x7fELF": "an executable: give a file of JSON lines",
    b"\xd0\xcf\x11\xe0": "an Office document: write its texts as jsonl",
    b"version https://git-lfs.github.com/": "a git-lfs pointer instead of the file: fetch the file with git lfs pull",
    b"\xff\xfe\x00\x00": "text in UTF-32: convert it, as with iconv -f UTF-32 -t UTF-8",
    b"\x00\x00\xfe\xff": "text in UTF-32: convert it, as with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "text in UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "text in UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
}
_PATTERNS = {
    rb"[\x50-\x5f]\x2a\x4d\x18": "compressed with zstd or lz4: decompress it with zstd -d or lz4 -d",
    rb"\x80[\x02-\x05]": "a Python pickle: write its texts as jsonl",
    rb".{257}ustar": "a tar archive: unpack it with tar -xf",
    rb'.{5}\x00\x00\x00\{"': "a safetensors file with weights: give a file of JSON lines",
    rb"([\t\n\r -~]\x00\x00\x00){2}": "text in UTF-32: convert it, as with iconv -f UTF-32LE -t UTF-8",
    rb"(\x00\x00\x00[\t\n\r -~]){2}": "text in UTF-32: convert it, as with iconv -f UTF-32BE -t UTF-8",
    rb"([\t\n\r -~]\x00){4}": "text in UTF-16: convert it, as with iconv -f UTF-16LE -t UTF-8",
    rb"(\x00[\t\n\r -~]){4}": "text in UTF-16: convert it, as with iconv -f UTF-16BE -t UTF-8",
    rb"\x00": "not text, it begins with NUL bytes, as an incompletely written file does: copy or create it again",
}
_NEVER_IN_TEXT = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")
_COLUMN = re.compile(rb'"?([\w\x80-\xff]([\w .:/()\x80-\xff-]{0,60}[\w)\x80-\xff])?)?"?')
_TABLES = {b",": "commas (CSV)", b"\t": "tabs (TSV)", b";": "semicolons (CSV)", b"|": "vertical bars"}


def kind_of_bytes(start: bytes) -> str | None:
    """Type and fix of a file that is neither UTF-8 text nor in a supported compression format, or None.

    Args:
        start: its first bytes.
    """
    for magic, what in _MAGICS.items():
        if start.startswith(magic):
            return what
    for pattern, what in _PATTERNS.items():
        if re.match(pattern, start, re.DOTALL):
            return what
    return None


def kind_of_lines(file: str, lines: Sequence[bytes]) -> str | None:
    """Type and fix of a text file that is not JSON; None if one of its first lines is JSON, or if unknown.

    Args:
        file: its name.
        lines: the first ones.
    """
    some = _first_lines(lines)
    if not some:
        return None
    first, name = some[0], shlex.quote(file)
    if re.match(rb"[\[{]\s*[\[{]?\s*'", first) and not any(map(_is_row, some)):
        return "not JSON, its strings are in single quotes as Python prints them: write each line with json.dumps"
    if _is_json(first) or any(map(_is_row, some)):
        return None
    if b"\r" in first:
        return (
            f"text with bare carriage returns as line ends: convert it, as with tr '\\r' '\\n' < {name} > lines.jsonl"
        )
    return _kind_of_line(first, some)


def begins_with_json(lines: Sequence[bytes]) -> bool:
    """Whether the first line that is not empty is an object or array in JSON, or begins one.

    Args:
        lines: the first ones of a file.
    """
    some = _first_lines(lines)
    return bool(some) and (_is_row(some[0]) or has_json_values(lines))


def has_json_values(lines: Sequence[bytes]) -> bool:
    """Whether a text file is JSON that is not one value per line: one array, objects over several lines, several on a
    line, or objects with a comma after each.

    Args:
        lines: the first ones.
    """
    some = _first_lines(lines)
    if not some:
        return False
    first = some[0]
    if _is_array(first, some) or _is_spread(lines, some):
        return True
    begun = _begun(first)
    return bool(begun) and begun != len(first) and first[begun:].lstrip().startswith((b"{", b"[", b","))


def _first_lines(lines: Sequence[bytes]) -> list[bytes]:
    return [line.strip() for line in lines[: 10 * _LINES] if line.strip()][:_LINES]


def _kind_of_line(first: bytes, some: Sequence[bytes]) -> str | None:
    """Type and fix of a file by its first line, if none of its first lines is JSON."""
    if first.startswith((b"{", b"[")):
        return None
    head = b"\n".join(some)[:START_BYTES]
    if found := _NEVER_IN_TEXT.search(head):
        return f"not text but binary data (0x{found[0][0]:02x} among its first bytes): write its texts as jsonl"
    if first.startswith(b"<"):
        return "a web page or XML: write its texts as jsonl"
    for mark, what in _TABLES.items():
        columns = first.split(mark)
        if len(columns) > 1 and all(map(_COLUMN.fullmatch, columns)):
            return (
                f"a table with {what} between its columns: write it as jsonl, as with pandas.read_csv(FILE, "
                f"sep={mark.decode()!r}).to_json(OUT, orient='records', lines=True)"
            )
    try:
        words = first[:200].decode(errors="strict" if len(first) <= 200 else "ignore")
    except UnicodeDecodeError:
        return None  # reading the line reports this
    return None if first.startswith(b'"') else f"not JSON, it begins with {words[:30]!r}: write one JSON object a line"


def _is_json(line: bytes) -> bool:
    return _begun(line) == len(line)


def _is_row(line: bytes) -> bool:
    return line.startswith((b"{", b"[")) and _is_json(line)


def _begun(line: bytes) -> int | None:
    """End of the first JSON value of a line, or None."""
    try:
        text = line.decode()
        return len(text[: json.JSONDecoder().raw_decode(text)[1]].encode())
    except (ValueError, RecursionError):
        return None


def _is_array(first: bytes, some: Sequence[bytes]) -> bool:
    """Whether the file is one JSON array, possibly over several lines; a line may itself be the list of turns of one
    conversation."""
    if not first.startswith(b"["):
        return False
    if len(first) > _MOST_PARSED or not _is_json(first):
        return first == b"[" or first.startswith((b"[{", b"[["))
    content, alone = json.loads(first), len(some) == 1
    return bool(content) and (_is_a_row(content[0]) or (alone and not _is_a_turn(content[0])))


def _is_a_row(value: object) -> bool:
    return isinstance(value, dict) and bool(_KEYS & value.keys())


def _is_a_turn(value: object) -> bool:
    """Whether an array that begins with this may be the turns of one conversation."""
    return not isinstance(value, list) and not (isinstance(value, dict) and value and not _OF_TURNS & value.keys())


def _is_spread(lines: Sequence[bytes], some: Sequence[bytes]) -> bool:
    """Whether an object begins on the first line and ends on another one."""
    first = some[0]
    if not first.startswith(b"{") or len(some) < 2 or _begun(first) is not None:
        return False
    whole = b"".join(lines).lstrip()
    end = _begun(whole)
    return end is not None or (first == b"{" and some[1].startswith(b'"'))
