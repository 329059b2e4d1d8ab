"""JSON files that know their own checksum: a single changed bit in one of them is seen. No torch."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

_SEAL = "crc32"


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes an object and its checksum; on disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(_text(content))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """Reads what `write` has written.

    Raises:
        ValueError: it is not that, to the last byte.
        OSError: it cannot be read.
    """
    text = path.read_bytes().decode("utf-8")
    content = json.loads(text)
    if not isinstance(content, dict) or _SEAL not in content:
        raise ValueError("it has no checksum")
    del content[_SEAL]
    if text != _text(content):
        raise ValueError("its checksum is another one")
    return content


def _text(content: dict[str, Any]) -> str:
    seal = zlib.crc32(json.dumps(content).encode())
    return json.dumps({**content, _SEAL: seal}, indent=1) + "\n"
