"""Streaming access to safetensors files: reads and writes rows of a tensor in place, never a complete file.

A file is 8 bytes of header length, a JSON header with type, shape and byte range of each tensor, and the bytes. Memory
mapping, as in the safetensors library, would count every page read so far towards the memory of this process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_capgap.common.errors import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights."""
# A file may also contain other tensors, such as masks; their sizes are needed to validate the file size.
_KNOWN = {
    **DTYPES,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 32 << 20  # a thousand layers need 1 MB; a header that exhausts the memory is an attack
_REMEDY = "copy or download the file again"
_SAVE_AGAIN = f"save the model in one of {', '.join(DTYPES)}"


@dataclass(frozen=True)
class Stored:
    """Location of a tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    @property
    def elements(self) -> int:
        """Number of elements, exact even for the huge shapes of a damaged header."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.elements * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, Stored]:
    """Reads the tensors of a file; checks every length and offset against the file's size.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file, or a tensor's type is not supported.
    """
    try:
        length, start, content = file.stat().st_size, 8, _header_bytes(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {_REMEDY}") from None
    start += len(content)
    try:
        entries = json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its header is not JSON ({error}); {_REMEDY}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{file}: its header is {type(entries).__name__}, not an object; {_REMEDY}")
    entries.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, start) for name, entry in entries.items()}
    end = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != end:
            raise UserError(
                f"{file}: {shown(name)} begins at byte {stored.offset}, the one before it ends at {end}; {_REMEDY}"
            )
        end += stored.nbytes
    if end != length:
        raise UserError(f"{file}: is {length} bytes long, its header implies {end}; {_REMEDY}")
    return tensors


def refuse_other_types(tensors: Mapping[str, Stored]) -> None:
    """Rejects weights whose type is not in `DTYPES`.

    Raises:
        UserError: names the first of them.
    """
    for name, stored in tensors.items():
        if stored.dtype not in _NAMES:
            kind = str(stored.dtype).removeprefix("torch.")
            raise UserError(
                f"{stored.file}: {shown(name)} is of type {kind}, which is not supported for weights; {_SAVE_AGAIN}"
            )


def shown(name: str) -> str:
    """Escapes a tensor's name for a message: a file may contain line ends and control sequences in it."""
    return name if name.isprintable() else ascii(name)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Converts a tensor to another type.

    Raises:
        UserError: a value is too large for the type.
    """
    result = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
        kind = str(dtype).removeprefix("torch.")
        largest = tensor[tensor.isfinite()].abs().max()
        raise UserError(f"{shown(name)}: contains {largest:g}, too large for {kind}; choose another --dtype")
    return result


def _header_bytes(file: Path) -> bytes:
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or size > os.fstat(stream.fileno()).st_size - 8:
            raise UserError(f"{file}: is truncated or not a safetensors file (a header of {size} bytes); {_REMEDY}")
        if size > _LARGEST_HEADER:
            raise UserError(f"{file}: a header of {size} bytes exceeds the limit of {_LARGEST_HEADER}; {_REMEDY}")
        return stream.read(size)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} is listed twice")
    return found


def _stored(file: Path, name: str, entry: Any, start: int) -> Stored:
    """Validates one entry of the header."""
    name = shown(name)
    wrong = UserError(f"{file}: {name} has a damaged entry in the header; {_REMEDY}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise wrong
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if len(offsets) != 2 or not all(type(number) is int and number >= 0 for number in numbers):
        raise wrong
    if not isinstance(dtype, str) or dtype not in _KNOWN:
        raise UserError(f"{file}: {name} is of type {dtype!r}, which is not supported; {_SAVE_AGAIN}")
    stored = Stored(file, _KNOWN[dtype], tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != stored.nbytes:
        raise UserError(f"{file}: {name} {shape} has {offsets[1] - offsets[0]} bytes, not {stored.nbytes}; {_REMEDY}")
    return stored


class Files:
    """Keeps files open and reads rows of tensors from them."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read(self, stored: Stored, start: int = 0, count: int | None = None) -> Tensor:
        """Reads rows `start` to `start + count` of a tensor, on the CPU: `[count, ...]`."""
        count = stored.shape[0] - start if count is None else count
        buffer = torch.empty((count, *stored.shape[1:]), dtype=stored.dtype)
        self.read_into(buffer, stored, start)
        return buffer

    def read_into(self, buffer: Tensor, stored: Stored, start: int) -> None:
        """Reads rows from `start` on into a contiguous buffer `[count, ...]` of the tensor's type."""
        view = buffer.view(torch.uint8).numpy().data.cast("B") if buffer.numel() else memoryview(b"")
        file, offset, done = self._descriptor(stored.file), stored.offset + start * stored.row_bytes, 0
        while done < len(view):  # one call reads 2 GiB at most
            if (got := os.preadv(file, [view[done:]], offset + done)) == 0:
                raise UserError(f"{stored.file}: is truncated within a tensor; {_REMEDY}")
            done += got

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def close(self) -> None:
        """Closes all files."""
        for file in self._open.values():
            os.close(file)
        self._open = {}


class Writer:
    """Writes one file; rows of its tensors may come in any order.

    Args:
        file: the file to create.
        tensors: type and shape of each tensor, in their order in the file.
    """

    def __init__(self, file: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)
        self._stored = {
            name: Stored(file, dtype, shape, 8 + len(content) + header[name]["data_offsets"][0])
            for name, (dtype, shape) in tensors.items()
        }
        self._written = dict.fromkeys(tensors, 0)
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _write(self._file, memoryview(len(content).to_bytes(8, "little") + content), 0)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Writes rows of a tensor: `[count, ...]`, on the CPU."""
        stored = self._stored[name]
        assert rows.dtype == stored.dtype and tuple(rows.shape[1:]) == stored.shape[1:], (name, rows.shape, stored)
        view = rows.contiguous().view(torch.uint8).numpy().data.cast("B")
        _write(self._file, view, stored.offset + start * stored.row_bytes)
        self._written[name] += rows.shape[0]

    def close(self) -> None:
        """Checks that every row was written once, and syncs the file to disk."""
        wrong = [name for name, rows in self._written.items() if rows != self._stored[name].shape[0]]
        assert not wrong, f"rows written too often or not at all: {wrong}"
        os.fsync(self._file)
        os.close(self._file)


def _write(file: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)
