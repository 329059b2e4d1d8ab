"""What a checkpoint consists of: every file with its size and checksum, written when it is complete, checked on load.

Each rank sums the files that it wrote, and checks its share of them: no rank reads a whole checkpoint.
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
    """What is known of a file: enough to see any flipped bit, and any other damage but for one in 4 thousand million.

    It guards against accidents, not against somebody who writes a new checksum too.
    """

    size: int
    crc32: int


def checksum(file: Path) -> FileChecksum:
    """Size and CRC-32 of a regular file; a symbolic link is refused, for it could lead out of the checkpoint.

    Raises:
        OSError: it cannot be read.
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
    """Lists the files of a completely written checkpoint. Collective; each rank sums what it wrote itself.

    PyTorch's writer can report success although a file is missing, so what `.metadata` speaks of must be there.

    Args:
        folder: the checkpoint.
        group: of all ranks, where the default one is busy with something else.

    Raises:
        UserError: a file is missing, too short or cannot be read; on every rank alike.
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
                raise UserError(f"{folder / name}: {found} after writing, {length} bytes were to be there; save again")
        files = {name: list(everywhere[name]) for name in sorted(everywhere)}
        checksummed_json.write(folder / CONTENTS, {"files": files})

    run_on_rank0(lambda: _on_disk(write), group)


def _on_disk(work: Callable[[], Result]) -> Result:
    """Names the file that a work could not read or write; what is to be done the one who saves knows better."""
    try:
        return work()
    except OSError as error:
        raise UserError(f"{error.filename or 'file system'}: {error.strerror or error}") from error


def verify(folder: Path) -> None:
    """Checks every file of a checkpoint, and walks its pickles, before anything of it is used. Collective.

    Raises:
        Damaged: a file is missing, or is not what was written; on every rank alike.
        UserError: it holds what no checkpoint of this project holds, or another version wrote it.
    """

    def check() -> None:
        metadata.read(folder)
        listed = _listed(folder)
        for name in _files_of_rank(listed, dist.get_rank(), dist.get_world_size()):
            _check_file(folder / name, listed[name])

    gather_from_ranks(check)
    # Only now, for a damaged pickle would read as a hostile one.
    run_on_rank0(lambda: safe_unpickle.check_files(folder, frozenset(_listed(folder))))


def _check_file(file: Path, wanted: FileChecksum) -> None:
    try:
        # The size first, which costs nothing.
        found = file.lstat().st_size
        if found != wanted.size:
            raise CheckpointCorrupted(f"{file}: {found} bytes, {wanted.size} were written; use another checkpoint")
        if checksum(file) != wanted:
            raise CheckpointCorrupted(
                f"{file}: its checksum is not the one of what was written; use another checkpoint"
            )
    except OSError as error:
        raise CheckpointCorrupted(
            f"{file}: cannot be read ({error.strerror or error}); use another checkpoint"
        ) from None


def _listed(folder: Path) -> dict[str, FileChecksum]:
    """The files that a checkpoint is to have, by name."""
    path = folder / CONTENTS
    try:
        files = checksummed_json.read(path)["files"]
        listed = {str(name): FileChecksum(int(size), int(crc)) for name, (size, crc) in files.items()}
    except FileNotFoundError:
        raise CheckpointCorrupted(f"{path}: is not there, so nothing can be checked; use another checkpoint") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointCorrupted(f"{path}: cannot be read ({error}); use another checkpoint") from None
    for name in [*listed, *safe_unpickle.MARKS]:
        if name not in listed or name != Path(name).name or name.startswith(".."):
            raise CheckpointCorrupted(
                f"{path}: does not list the files of a checkpoint ({name!r}); use another checkpoint"
            )
    return listed


def _files_of_rank(listed: Mapping[str, FileChecksum], rank: int, world: int) -> list[str]:
    """This rank's files: the largest are dealt out first, each to the rank that has least to read."""
    readers, mine = [(0, reader) for reader in range(world)], []
    for name in sorted(listed, key=lambda name: (-listed[name].size, name)):
        load, reader = readers[0]
        heapq.heapreplace(readers, (load + max(1, listed[name].size), reader))
        if reader == rank:
            mine.append(name)
    return mine
