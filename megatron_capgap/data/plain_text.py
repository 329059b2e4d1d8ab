"""Documents in plain text: a document a file, a line, or between blank lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from megatron_capgap.common.errors import UserError

DOCUMENTS = ("file", "line", "blank-line")
_MOST_BYTES = 64 << 20
"""Of one document."""
_NEVER_IN_TEXT = re.compile(r"[\x00-\x06\x0e-\x1a\x1c-\x1f]")


def documents_of_text(file: str, blocks: Iterable[list[bytes]], documents: str, key: str) -> Iterator[list[bytes]]:
    """Yields the documents of a text file as lines of JSON, some at a time.

    Args:
        file: its name, for messages.
        blocks: its lines.
        documents: what one document is, of `DOCUMENTS`; documents without a word are left out.
        key: key of the text in the JSON.

    Raises:
        UserError: the file is not text in UTF-8, or a document is too large.
    """
    begun: list[str] = []
    number = size = 0
    for block in blocks:
        done: list[str] = []
        for line in block:
            number += 1
            text = _decoded(file, number, line)
            if documents == "line":
                done.append(text.rstrip("\r\n"))
                continue
            if documents == "blank-line" and not text.strip():
                done.append("".join(begun))
                begun, size = [], 0
                continue
            begun.append(text)
            size += len(line)
            if size > _MOST_BYTES:
                raise UserError(
                    f"{file}: the document before line {number} has more than {_MOST_BYTES >> 20} MiB: say what a "
                    "document is with --documents line or --documents blank-line"
                )
        if found := [_line(text, key) for text in done if text.strip()]:
            yield found
    if "".join(begun).strip():
        yield [_line("".join(begun), key)]


def _decoded(file: str, number: int, line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}): convert the "
            "file, as with iconv -f LATIN1 -t UTF-8"
        ) from None
    if found := _NEVER_IN_TEXT.search(text):
        raise UserError(f"{file}:{number}: not text but binary data (0x{ord(found[0]):02x}): leave the file out")
    return text


def _line(text: str, key: str) -> bytes:
    return json.dumps({key: text.strip("\r\n")}).encode()
