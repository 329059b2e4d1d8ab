"""Pickles in a checkpoint, read by hands that know a list of harmless names and nothing else.

PyTorch and Megatron-Core unpickle `.metadata` without looking. So each pickle of a checkpoint is first walked here;
what passes holds names from the lists below alone, and they can load it. Transformer Engine's pickles, which hold the
scales of older checkpoints, are read here alone.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_capgap.checkpoint.metadata import CheckpointCorrupted
from megatron_capgap.common.errors import UserError, in_one_line

METADATA = ".metadata"
COMMON = "common.pt"
MARKS = (METADATA, COMMON, "metadata.json")
"""What each checkpoint has beside the files with its tensors; rank 0 writes them."""
SCALES = "._extra_state"
"""What the names of FP8 scales hold in older checkpoints: the one kind of entry that is not a tensor."""

_OF_METADATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},  # older checkpoints have it
}
_OF_SCALES = {
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"_load_from_bytes"},
    # What newer releases of Megatron-Core put in its place.
    "megatron.core.safe_globals": {"safe_load_from_bytes"},
    "collections": {"OrderedDict"},
    "transformer_engine.common.recipe": {"DelayedScaling", "Format", "_FormatHelper"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
}


class _Recipe:
    """In the place of Transformer Engine's and Megatron-Core's recipes, whichever release pickled them: takes anything
    and does nothing."""

    def __new__(cls, *contents: object) -> _Recipe:
        return super().__new__(cls)


class _Unpickler(pickle.Unpickler):
    """Loads what needs no names but those of a list, and torch's number types."""

    def __init__(self, source: IO[bytes], allowed: Mapping[str, set[str]]) -> None:
        super().__init__(source)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in self._allowed.get(module, ()):
            raise _ForbiddenName(f"{module}.{name}")
        if name in ("_load_from_bytes", "safe_load_from_bytes"):
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if module.startswith(("transformer_engine.", "megatron.")):
            return _Recipe
        return super().find_class(module, name)


class _ForbiddenName(Exception):
    """A pickle asks for something that is not on the list."""


@dataclass(frozen=True)
class Index:
    """The `.metadata` of a checkpoint: which tensor lies in which file."""

    metadata: Metadata

    def places(self) -> dict[MetadataIndex, _StorageInfo]:
        """Where each piece lies."""
        return self.metadata.storage_data

    def lengths(self) -> dict[str, int]:
        """Bytes that each file with tensors must have at least."""
        found: dict[str, int] = {}
        for place in self.places().values():
            found[place.relative_path] = max(found.get(place.relative_path, 0), place.offset + place.length)
        return found


def read_metadata(folder: Path) -> Index:
    """Reads the `.metadata` of a checkpoint without running what it may hold.

    Raises:
        Damaged: it cannot be read.
        UserError: it holds something else than metadata.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as source:
            metadata = _Unpickler(source, _OF_METADATA).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError("no metadata in it")
    except _ForbiddenName as error:
        raise _untrusted_error(path, error) from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointCorrupted(
            f"{path}: cannot be read ({in_one_line(error, 200)}); use another checkpoint"
        ) from None
    return Index(metadata)


def check_files(folder: Path, files: frozenset[str]) -> None:
    """Walks every pickle of a checkpoint that PyTorch, Megatron-Core or Transformer Engine would load.

    Args:
        folder: the checkpoint, its checksums found right.
        files: the names of its files; nothing may lie in another one.

    Raises:
        UserError: there is something in it that a checkpoint does not need.
    """
    index = read_metadata(folder)
    try:
        _walk(folder, files, index)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        # Harmless names in places where no checkpoint has them.
        raise _untrusted_error(folder / METADATA, error) from None


def _walk(folder: Path, files: frozenset[str], index: Index) -> None:
    if outside := sorted(set(map(str, index.lengths())) - files):
        raise UserError(
            f"{folder / METADATA}: speaks of {outside[0]!r}, which is no file of this checkpoint; "
            "use one that this project wrote"
        )
    try:
        torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _untrusted_error(folder / COMMON, error) from None
    for name, entry in index.metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and SCALES in name:
            continue
        if type(entry) is not TensorStorageMetadata:
            raise _untrusted_error(folder / METADATA, f"{name} is no tensor")
    for key, place in index.places().items():
        if isinstance(index.metadata.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            _check_scales(folder / place.relative_path, place)


def _check_scales(file: Path, place: _StorageInfo) -> None:
    """Scales are tensors of bytes, or nothing, and the bytes are once more a pickle; Megatron-Core makes a list."""
    with open(file, "rb") as source:
        source.seek(place.offset)
        content = io.BytesIO(source.read(place.length))
    try:
        held = torch.load(content, map_location="cpu", weights_only=True)
        for one in held if isinstance(held, list) else [held]:
            load_scales(one)
    except Exception as error:
        raise _untrusted_error(file, error) from None


def load_scales(held: object) -> dict[str, torch.Tensor]:
    """What delayed scaling had learned, out of a module's `_extra_state` as Transformer Engine 2 pickled it.

    Args:
        held: a tensor of bytes, or nothing.

    Returns:
        `scale_fwd` and the others that `models.scales` knows by these names; empty where the module had not run.

    Raises:
        Exception: of any kind; it is none, or asks for a name that is not on the list.
    """
    if held is None:
        return {}
    if isinstance(held, torch.Tensor):
        held = io.BytesIO(held.numpy().tobytes())
    if not isinstance(held, io.BytesIO):
        raise TypeError(f"{type(held).__name__} in the place of scales")
    if not held.getbuffer().nbytes:
        return {}
    content = _Unpickler(held, _OF_SCALES).load()
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _untrusted_error(file: Path, reason: object) -> UserError:
    return UserError(
        f"{file}: holds what no checkpoint needs ({in_one_line(reason, 200)}) and was not loaded, for loading it could "
        "run a stranger's code; use one that this project wrote"
    )
