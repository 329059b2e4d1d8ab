"""JSON files with an embedded checksum, which detects any changed bit. Does not import torch."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

_SEAL = "crc32"


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes an object and its checksum; synced to disk on return."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(_text(content))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """Reads a file of `write`.

    Raises:
        ValueError: the file differs in any byte from what `write` wrote.
        OSError: the file cannot be read.
    """
    text = path.read_bytes().decode("utf-8")
    content = json.loads(text)
    if not isinstance(content, dict) or _SEAL not in content:
        raise ValueError("it has no checksum")
    del content[_SEAL]
    if text != _text(content):
        raise ValueError("checksum mismatch")
    return content


def _text(content: dict[str, Any]) -> str:
    seal = zlib.crc32(json.dumps(content).encode())
    return json.dumps({**content, _SEAL: seal}, indent=1) + "\n"
