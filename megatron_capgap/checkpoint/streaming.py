"""Streams Megatron's distributed checkpoints in blocks: one block at a time is in memory, never a complete model.

A tensor of all layers is one entry `[layers, rows, ...]` of the checkpoint; a block is a range of rows of one layer.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_capgap.checkpoint import integrity, safe_unpickle, writer
from megatron_capgap.common.errors import UserError, in_one_line


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint."""

    key: str
    """Its layout-independent name."""
    shape: tuple[int, ...]
    """`[layers, rows, ...]` where `layered`, else `[rows, ...]`."""
    dtype: torch.dtype
    layered: bool

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of one row of one layer."""
        return self.shape[2 if self.layered else 1 :]

    def bytes_a_row(self) -> int:
        """Bytes of one row of one layer."""
        return torch.Size(self.inner).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """Rows `start` to `start + count` of an entry, in one layer of it."""

    entry: TensorEntry
    layer: int
    start: int
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return self.count * self.entry.bytes_a_row()

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Its offsets and sizes in the entry."""
        inner = self.entry.inner
        offsets = (self.start, *(0 for _ in inner))
        sizes = (self.count, *inner)
        if self.entry.layered:
            offsets, sizes = (self.layer, *offsets), (1, *sizes)
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


BLOCK_BYTES = 32 << 20
"""Approximate size of a block; larger tensors are split into blocks of rows."""


def blocks(entry: TensorEntry, layer: int) -> Iterator[Block]:
    """Yields one layer of an entry in blocks of rows, in order."""
    rows = entry.shape[1 if entry.layered else 0]
    step = max(1, BLOCK_BYTES // max(1, entry.bytes_a_row()))
    for start in range(0, rows, step):
        yield Block(entry, layer, start, min(step, rows - start))


def blocks_of_rank(pieces: Sequence[Block], rank: int, world: int) -> list[Block]:
    """This rank's blocks: consecutive, with about the same number of bytes on each rank."""
    total = sum(piece.nbytes for piece in pieces)
    mine, done = [], 0
    for piece in pieces:
        if min(world - 1, done * world // max(1, total)) == rank:
            mine.append(piece)
        done += piece.nbytes
    return mine


def write(folder: Path, pieces: Sequence[Block], produce: Callable[[Block], Tensor]) -> None:
    """Writes this rank's blocks of a checkpoint; the blocks of all ranks cover every entry once. Collective.

    Args:
        folder: an empty folder.
        pieces: this rank's blocks.
        produce: returns the content of a block `[count, ...]`; called once per block, when it is written.

    Raises:
        UserError: a file could not be written; raised on all ranks.
    """
    writer.write(folder, writer.RankShards({}, _BlockSavePlanner(pieces, produce), common={}))


class Reader:
    """Verifies a checkpoint, then reads it in blocks. Construction is collective.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: it is damaged, or contains what a checkpoint does not need.
    """

    def __init__(self, folder: Path) -> None:
        integrity.verify(folder)
        self._folder = folder
        self._reader = FileSystemReader(folder)
        self._metadata = safe_unpickle.read_metadata(folder).metadata
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor, including optimizer state, by key."""
        found = self._metadata.state_dict_metadata.items()
        return {key: (tuple(e.size), e.properties.dtype) for key, e in found if isinstance(e, TensorStorageMetadata)}

    def read(self, piece: Block) -> Tensor:
        """Reads one block `[count, ...]`, on the CPU.

        Raises:
            UserError: a file of the checkpoint is missing or damaged.
        """
        chunk = piece.chunk
        target = torch.empty(chunk.sizes, dtype=piece.entry.dtype)
        stored = self._metadata.state_dict_metadata[piece.entry.key]
        assert isinstance(stored, TensorStorageMetadata), "blocks are of entries that `tensors` lists"
        items = create_read_items_for_chunk_list(piece.entry.key, stored, [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _BlockLoadPlanner(target)).wait()
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            reason = in_one_line(error, 200)
            raise UserError(
                f"{self._folder}: {piece.entry.key} cannot be read ({reason}); use another checkpoint"
            ) from None
        return target[0] if piece.entry.layered else target


class _BlockSavePlanner(SavePlanner):
    """Save planner that produces each tensor when it is written."""

    def __init__(self, pieces: Sequence[Block], produce: Callable[[Block], Tensor]) -> None:
        self._produce = produce
        self._pieces = {MetadataIndex(piece.entry.key, piece.chunk.offsets): piece for piece in pieces}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, piece in self._pieces.items():
            properties = TensorProperties(dtype=piece.entry.dtype)
            data = TensorWriteData(chunk=piece.chunk, properties=properties, size=torch.Size(piece.entry.shape))
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        # torch numbers the chunks of an entry in the global plan; the offsets identify them as well.
        piece = self._pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensor = self._produce(piece)
        assert tensor.dtype == piece.entry.dtype and tensor.shape[0] == piece.count, (piece, tensor.shape)
        return tensor.reshape(piece.chunk.sizes)


class _BlockLoadPlanner(LoadPlanner):
    """Load planner that reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the plan is given")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("only tensors are read")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the resolved tensor is a view of the target."""
