"""The one writer of a checkpoint's files: PyTorch's distributed checkpoint with Megatron-Core's marks, and the list.

PyTorch gathers what goes wrong in each part on any rank, and raises on all of them: no rank waits for one that failed.
Megatron-Core's own `save` writes `common.pt` on rank 0 outside of that, and forks processes that outlive a killed rank.
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
    """What one rank writes."""

    entries: Mapping[str, Any]
    """What the planner plans with."""
    planner: SavePlanner
    """Knows this rank's part."""
    common: Mapping[str, Any]
    """What is no tensor, the same on all ranks; numbers and words."""


def rank_shards(state: ShardedStateDict, group: dist.ProcessGroup | None = None) -> RankShards:
    """This rank's part of a sharded state dict. Collective.

    Args:
        state: is taken apart.
        group: of all ranks, where the default one is busy with something else.
    """
    # Megatron's own check of the shards would take the default group.
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    shapes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, [shard.without_data() for shard in nested_values(sharded)], group)
    validate_sharding_integrity(shapes)
    # What Megatron-Core's own strategy for PyTorch's format does, up to its writer.
    by_key, _, _ = strategy._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    entries = strategy.mcore_to_pyt_state_dict(by_key)
    planner = strategy.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    return RankShards(entries, planner, common)


def write(folder: Path, part: RankShards, group: dist.ProcessGroup | None = None) -> None:
    """Writes all files of a checkpoint but its manifest, and lists them. Collective.

    Args:
        folder: an empty folder.
        part: this rank's.
        group: of all ranks, where the default one is busy with something else.

    Raises:
        UserError: a file could not be written, or is not whole afterwards; on every rank alike.
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
        raise UserError(f"{where}: rank {rank} could not write its part ({what}); free space or mend it") from error
    integrity.write_checksums(folder, group)


class _Writer(FileSystemWriter):
    """Files that are on disk when `save` returns."""

    def __init__(self, folder: Path, common: Mapping[str, Any]) -> None:
        # One thread, for PyTorch loses an error of a second one.
        super().__init__(folder, thread_count=1, sync_files=False)
        self._folder, self._common = folder, common

    def _write_data(self, *arguments: Any) -> Any:
        written = super()._write_data(*arguments)
        for name in {result.storage_data.relative_path for result in written.value()}:
            _sync(self._folder / name)
        return written

    def storage_meta(self) -> StorageMeta:
        """PyTorch's own holds a Path, which Python 3.13 pickles by a name that no other Python knows."""
        return StorageMeta(checkpoint_id=str(self._folder), save_id=self.save_id)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes, on the first rank, what stands beside the tensors."""
        with open(self._folder / safe_unpickle.COMMON, "wb") as file:
            torch.save(dict(self._common), file)
        super().finish(metadata, results)
        save_config(CheckpointingConfig("torch_dist"), str(self._folder))
        for name in safe_unpickle.MARKS:
            _sync(self._folder / name)


def _sync(file: Path) -> None:
    """Puts a file on disk; an error that only shows there is raised here."""
    with open(file, "rb") as written:
        os.fsync(written.fileno())
