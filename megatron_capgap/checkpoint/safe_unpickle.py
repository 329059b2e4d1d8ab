"""Restricted unpickling of checkpoint files: only allow-listed globals.

PyTorch and Megatron-Core unpickle `.metadata` without checks. Each pickle of a checkpoint is therefore checked here
before they load it. Transformer Engine pickles with the FP8 scales of older checkpoints are loaded only here.
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

DCP_METADATA_FILE = ".metadata"
COMMON = "common.pt"
MARKS = (DCP_METADATA_FILE, COMMON, "metadata.json")
"""Files of each checkpoint besides those with tensors; rank 0 writes them."""
SCALES = "._extra_state"
"""Substring of the names of FP8 scales in older checkpoints: the only kind of entry that is not a tensor."""

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
    # Replacement in newer releases of Megatron-Core.
    "megatron.core.safe_globals": {"safe_load_from_bytes"},
    "collections": {"OrderedDict"},
    "transformer_engine.common.recipe": {"DelayedScaling", "Format", "_FormatHelper"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
}


class _Recipe:
    """Stub for pickled recipes of any Transformer Engine or Megatron-Core release; accepts any arguments."""

    def __new__(cls, *contents: object) -> _Recipe:
        return super().__new__(cls)


class _Unpickler(pickle.Unpickler):
    """Unpickler that allows only listed globals and torch dtypes."""

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
    """A pickle refers to a global that is not allow-listed."""


@dataclass(frozen=True)
class Index:
    """The `.metadata` of a checkpoint: location of each tensor."""

    metadata: Metadata

    def places(self) -> dict[MetadataIndex, _StorageInfo]:
        """Location of each chunk."""
        return self.metadata.storage_data

    def lengths(self) -> dict[str, int]:
        """Minimum size in bytes of each file with tensors."""
        found: dict[str, int] = {}
        for place in self.places().values():
            found[place.relative_path] = max(found.get(place.relative_path, 0), place.offset + place.length)
        return found


def read_metadata(folder: Path) -> Index:
    """Reads the `.metadata` of a checkpoint without running code in it.

    Raises:
        CheckpointCorrupted: it cannot be read.
        UserError: it refers to globals other than metadata.
    """
    path = folder / DCP_METADATA_FILE
    try:
        with open(path, "rb") as source:
            metadata = _Unpickler(source, _OF_METADATA).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError("it contains no metadata")
    except _ForbiddenName as error:
        raise _untrusted_error(path, error) from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointCorrupted(
            f"{path}: cannot be read ({in_one_line(error, 200)}); use another checkpoint"
        ) from None
    return Index(metadata)


def check_files(folder: Path, files: frozenset[str]) -> None:
    """Checks every pickle of a checkpoint that PyTorch, Megatron-Core or Transformer Engine would load.

    Args:
        folder: the checkpoint, with verified checksums.
        files: names of its files; entries may not refer to others.

    Raises:
        UserError: a pickle contains something that a checkpoint does not need.
    """
    index = read_metadata(folder)
    try:
        _walk(folder, files, index)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        # Allowed globals in places where no checkpoint has them.
        raise _untrusted_error(folder / DCP_METADATA_FILE, error) from None


def _walk(folder: Path, files: frozenset[str], index: Index) -> None:
    if outside := sorted(set(map(str, index.lengths())) - files):
        raise UserError(
            f"{folder / DCP_METADATA_FILE}: refers to {outside[0]!r}, which is not a file of this checkpoint; "
            "use a checkpoint that this project wrote"
        )
    try:
        torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _untrusted_error(folder / COMMON, error) from None
    for name, entry in index.metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and SCALES in name:
            continue
        if type(entry) is not TensorStorageMetadata:
            raise _untrusted_error(folder / DCP_METADATA_FILE, f"{name} is not a tensor")
    for key, place in index.places().items():
        if isinstance(index.metadata.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            _check_scales(folder / place.relative_path, place)


def _check_scales(file: Path, place: _StorageInfo) -> None:
    """Checks pickled scales: byte tensors that contain another pickle, or None; Megatron-Core stores a list of them."""
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
    """Unpickles the state of delayed scaling from a module's `_extra_state` of Transformer Engine 2.

    Args:
        held: a tensor of bytes, or None.

    Returns:
        `scale_fwd` and the other tensors of `models.fp8_scales` by name; empty if the module had not run.

    Raises:
        Exception: of any type, if `held` is not such a state or refers to a global that is not allow-listed.
    """
    if held is None:
        return {}
    if isinstance(held, torch.Tensor):
        held = io.BytesIO(held.numpy().tobytes())
    if not isinstance(held, io.BytesIO):
        raise TypeError(f"{type(held).__name__} instead of scales")
    if not held.getbuffer().nbytes:
        return {}
    content = _Unpickler(held, _OF_SCALES).load()
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _untrusted_error(file: Path, reason: object) -> UserError:
    return UserError(
        f"{file}: contains what no checkpoint needs ({in_one_line(reason, 200)}) and was not loaded: loading it could "
        "run untrusted code; use a checkpoint that this project wrote"
    )
