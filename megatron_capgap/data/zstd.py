"""Files compressed with zstd, read as gzip.open reads gzip."""

from __future__ import annotations

import io
import os
from typing import IO, Any

from megatron_capgap.common.errors import UserError, in_one_line

_READ_BYTES = 1 << 17


def open_zstd(raw: IO[bytes], mode: str = "rb") -> IO[bytes]:
    """A stream of the decompressed content, over all frames.

    Args:
        raw: the file, at its start.
        mode: rb.

    Raises:
        UserError: the package zstandard is not installed.
    """
    assert mode == "rb"
    return io.BufferedReader(_Zstd(raw))


class _Zstd(io.RawIOBase):
    """Raises EOFError where the file ends within a frame, which zstandard's own reader takes for the end, and OSError
    where it is damaged."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{raw.name}: is compressed with zstd: pip install zstandard, or decompress it with zstd -d"
            ) from None
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._packed = self._content = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert (offset, whence) == (0, os.SEEK_SET), "only back to the start"
        self._frame, self._packed, self._content = None, b"", b""
        return self._raw.seek(0)

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._raw.read(_READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._content = self._frame.decompress(self._packed)
        except self._zstandard.ZstdError as error:
            raise OSError(in_one_line(error)) from None
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
