"""Writes a checkpoint's files: PyTorch's distributed checkpoint, Megatron-Core's marker files, and the checksums.

PyTorch gathers the errors of all ranks and raises on each, so no rank waits for a failed one. Megatron-Core's own
`save` writes `common.pt` on rank 0 outside of that, and forks processes that outlive a killed rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as strategy
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemWriter, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult

from megatron_capgap.checkpoint import integrity, safe_unpickle
from megatron_capgap.common.errors import UserError, in_one_line


@dataclass(frozen=True)
class RankShards:
    """Data that one rank writes."""

    entries: Mapping[str, Any]
    """State dict of the save plan."""
    planner: SavePlanner
    """Planner of this rank's part."""
    common: Mapping[str, Any]
    """Non-tensor values (numbers and strings), the same on all ranks."""


def rank_shards(state: ShardedStateDict, group: dist.ProcessGroup | None = None) -> RankShards:
    """This rank's part of a sharded state dict. Collective.

    Args:
        state: the state; modified by this call.
        group: process group of all ranks; None is the default group.
    """
    # Megatron's own check of the shards would use the default group.
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    shapes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, [shard.without_data() for shard in nested_values(sharded)], group)
    validate_sharding_integrity(shapes)
    # As in Megatron-Core's own strategy for PyTorch's format, up to its writer.
    by_key, _, _ = strategy._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    entries = strategy.mcore_to_pyt_state_dict(by_key)
    planner = strategy.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    return RankShards(entries, planner, common)


def write(folder: Path, part: RankShards, group: dist.ProcessGroup | None = None) -> None:
    """Writes all files of a checkpoint except its metadata, and the list of their checksums. Collective.

    Args:
        folder: an empty folder.
        part: this rank's data.
        group: process group of all ranks; None is the default group.

    Raises:
        UserError: a file could not be written, or is incomplete afterwards; raised on all ranks.
    """
    try:
        torch_checkpoint.save(
            dict(part.entries), storage_writer=_Writer(folder, part.common), planner=part.planner, process_group=group
        )
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if not isinstance(reason, OSError | RuntimeError | UserError):
            raise
        what = getattr(reason, "strerror", None) or in_one_line(reason, 200)
        where = getattr(reason, "filename", None) or folder
        raise UserError(
            f"{where}: rank {rank} could not write its part ({what}); free space or fix the file system"
        ) from error
    integrity.write_checksums(folder, group)


class _Writer(FileSystemWriter):
    """File system writer that syncs its files to disk before `save` returns."""

    def __init__(self, folder: Path, common: Mapping[str, Any]) -> None:
        # One thread: PyTorch loses the errors of further threads.
        super().__init__(folder, thread_count=1, sync_files=False)
        self._folder, self._common = folder, common

    def _write_data(self, *arguments: Any) -> Any:
        written = super()._write_data(*arguments)
        for name in {result.storage_data.relative_path for result in written.value()}:
            _sync(self._folder / name)
        return written

    def storage_meta(self) -> StorageMeta:
        """Uses a string: PyTorch's own has a Path, whose Python 3.13 pickle other versions cannot read."""
        return StorageMeta(checkpoint_id=str(self._folder), save_id=self.save_id)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the files besides the tensors, on the first rank."""
        with open(self._folder / safe_unpickle.COMMON, "wb") as file:
            torch.save(dict(self._common), file)
        super().finish(metadata, results)
        save_config(CheckpointingConfig("torch_dist"), str(self._folder))
        for name in safe_unpickle.MARKS:
            _sync(self._folder / name)


def _sync(file: Path) -> None:
    """Syncs a file to disk, so that delayed write errors are raised here."""
    with open(file, "rb") as written:
        os.fsync(written.fileno())
