"""JSON that is not one value per line: an array, objects over several lines, several on a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

_BETWEEN = re.compile(r"[\s,]*")
_TAIL = 16  # characters: an error this close to the end of what is read may be a value that goes on


def json_values(chunks: Iterable[str]) -> Iterator[Any]:
    """Yields the values of a JSON text: the elements if it is one array, else the values one after another, with or
    without commas between them.

    Args:
        chunks: the text in pieces; one value is held in memory at a time.

    Raises:
        ValueError: a value is not JSON, or the text ends within one.
    """
    text, array, complete = "", None, False
    stream = iter(chunks)
    decoder = json.JSONDecoder()
    at = 0
    while True:
        at = _end(_BETWEEN, text, at)
        if array is None and at < len(text):
            array = text[at] == "["
            at = _end(_BETWEEN, text, at + 1) if array else at
        if array and at < len(text) and text[at] == "]":
            array, at = False, at + 1
            continue
        try:
            value, end = decoder.raw_decode(text, at) if at < len(text) else (None, at)
        except json.JSONDecodeError as error:
            if complete or not _may_go_on(error, text):
                raise ValueError(f"{error.msg} at character {error.pos - at + 1} of it") from None
            end = at
        if at < end and (end < len(text) or complete):
            yield value
            at = end
            continue
        if complete:
            if array:
                raise ValueError("the array has no end, as in an incompletely written file")
            return
        chunk = next(stream, None)
        complete = chunk is None
        text, at = text[at:] + (chunk or ""), 0


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None
    return found.end()


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text may complete the value in which an error occurred."""
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - _TAIL
