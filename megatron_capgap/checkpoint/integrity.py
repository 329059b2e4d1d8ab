"""Size and checksum of every file of a checkpoint: written when it is complete, verified on load.

Each rank computes the checksums of the files that it wrote, and verifies its share: no rank reads a complete
checkpoint.
"""

from __future__ import annotations

import heapq
import os
import stat
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from megatron_capgap.checkpoint import checksummed_json, metadata, safe_unpickle
from megatron_capgap.checkpoint.metadata import CONTENTS, CheckpointCorrupted
from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed.collectives import gather_from_ranks, run_on_rank0

_BLOCK = 1 << 20
Result = TypeVar("Result")


class FileChecksum(NamedTuple):
    """Size and CRC-32 of a file: detects any single flipped bit, and other damage except for 1 in 4 * 10^9.

    Protects against accidental damage, not against an attacker who also updates the checksum.
    """

    size: int
    crc32: int


def checksum(file: Path) -> FileChecksum:
    """Size and CRC-32 of a regular file; rejects symbolic links, which could point outside the checkpoint.

    Raises:
        OSError: the file cannot be read.
    """
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as source:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise OSError(0, "is not a regular file", str(file))
        block, size, crc = bytearray(_BLOCK), 0, 0
        view = memoryview(block)
        while count := source.readinto(block):
            size, crc = size + count, zlib.crc32(view[:count], crc)
    return FileChecksum(size, crc)


def write_checksums(folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes the list of files of a complete checkpoint. Collective; each rank reads the files that it wrote.

    PyTorch's writer can report success although a file is missing, so the files in `.metadata` must exist.

    Args:
        folder: the checkpoint.
        group: process group of all ranks; None is the default group.

    Raises:
        UserError: a file is missing, too short or cannot be read; raised on all ranks.
    """
    rank = dist.get_rank()

    def sums() -> dict[str, FileChecksum]:
        mine = [*folder.glob(f"__{rank}_*"), *([folder / name for name in safe_unpickle.MARKS] if rank == 0 else [])]
        return {file.name: checksum(file) for file in mine}

    everywhere = {name: one for part in gather_from_ranks(lambda: _on_disk(sums), group) for name, one in part.items()}

    def write() -> None:
        for name, length in safe_unpickle.read_metadata(folder).lengths().items():
            if name not in everywhere or everywhere[name].size < length:
                found = f"{everywhere[name].size} bytes" if name in everywhere else "missing"
                raise UserError(f"{folder / name}: {found} after writing, expected {length} bytes; save again")
        files = {name: list(everywhere[name]) for name in sorted(everywhere)}
        checksummed_json.write(folder / CONTENTS, {"files": files})

    run_on_rank0(lambda: _on_disk(write), group)


def _on_disk(work: Callable[[], Result]) -> Result:
    """Converts an OSError to a UserError that names the file; the caller adds the fix."""
    try:
        return work()
    except OSError as error:
        raise UserError(f"{error.filename or 'file system'}: {error.strerror or error}") from error


def verify(folder: Path) -> None:
    """Verifies every file of a checkpoint and checks its pickles before anything is used. Collective.

    Raises:
        CheckpointCorrupted: a file is missing or differs from what was written; raised on all ranks.
        UserError: a pickle contains forbidden globals, or another version wrote the checkpoint.
    """

    def check() -> None:
        metadata.read(folder)
        listed = _listed(folder)
        for name in _files_of_rank(listed, dist.get_rank(), dist.get_world_size()):
            _check_file(folder / name, listed[name])

    gather_from_ranks(check)
    # After the checksums: otherwise a damaged pickle would be reported as an untrusted one.
    run_on_rank0(lambda: safe_unpickle.check_files(folder, frozenset(_listed(folder))))


def _check_file(file: Path, wanted: FileChecksum) -> None:
    try:
        # Size first: it is cheap.
        found = file.lstat().st_size
        if found != wanted.size:
            raise CheckpointCorrupted(f"{file}: {found} bytes, expected {wanted.size}; use another checkpoint")
        if checksum(file) != wanted:
            raise CheckpointCorrupted(f"{file}: checksum mismatch; use another checkpoint")
    except OSError as error:
        raise CheckpointCorrupted(
            f"{file}: cannot be read ({error.strerror or error}); use another checkpoint"
        ) from None


def _listed(folder: Path) -> dict[str, FileChecksum]:
    """Expected files of a checkpoint, by name."""
    path = folder / CONTENTS
    try:
        files = checksummed_json.read(path)["files"]
        listed = {str(name): FileChecksum(int(size), int(crc)) for name, (size, crc) in files.items()}
    except FileNotFoundError:
        raise CheckpointCorrupted(
            f"{path}: is missing, so the checkpoint cannot be verified; use another checkpoint"
        ) from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointCorrupted(f"{path}: cannot be read ({error}); use another checkpoint") from None
    for name in [*listed, *safe_unpickle.MARKS]:
        if name not in listed or name != Path(name).name or name.startswith(".."):
            raise CheckpointCorrupted(
                f"{path}: is not a valid list of checkpoint files ({name!r}); use another checkpoint"
            )
    return listed


def _files_of_rank(listed: Mapping[str, FileChecksum], rank: int, world: int) -> list[str]:
    """Files that this rank verifies: largest first, each assigned to the rank with the fewest bytes."""
    readers, mine = [(0, reader) for reader in range(world)], []
    for name in sorted(listed, key=lambda name: (-listed[name].size, name)):
        load, reader = readers[0]
        heapq.heapreplace(readers, (load + max(1, listed[name].size), reader))
        if reader == rank:
            mine.append(name)
    return mine
