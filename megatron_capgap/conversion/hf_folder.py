"""Opens a Hugging Face folder as untrusted input: validates everything, executes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_capgap.checkpoint import foreign
from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion.family import Family, Settings
from megatron_capgap.conversion.hf_config import read_config, read_json
from megatron_capgap.conversion.safetensors import Stored, read_header, refuse_other_types, shown
from megatron_capgap.models import size

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_IMPLAUSIBLE = 1000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class HfFolder:
    """A model in a Hugging Face folder."""

    folder: Path
    family: Family
    shape: ModelShape
    config: dict[str, Any]
    """Content of config.json."""
    tensors: dict[str, Stored]
    """Every weight by its full name, without buffers."""
    skipped: tuple[str, ...]
    """Names of the skipped buffers."""
    remarks: tuple[str, ...] = ()
    """Warnings from reading the tokenizer."""


def open_hf_folder(folder: Path) -> HfFolder:
    """Reads config.json, the index and every header.

    Raises:
        UserError: a file is missing, damaged or outside the folder, or the model is not supported.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder with config.json and safetensors files")
    if not (folder / "config.json").exists():
        foreign.refuse(folder)
    config = read_json(folder / "config.json")
    family, shape = read_config(folder / "config.json", config)
    tensors = _full_names(_tensors(folder, _tied(family, shape)), family)
    buffers = [name for name in tensors if any(re.fullmatch(pattern, name) for pattern in family.buffers)]
    kept = {name: stored for name, stored in tensors.items() if name not in buffers}
    refuse_other_types(kept)
    _check_size(Settings(folder / "config.json", config), shape, kept)
    return HfFolder(folder, family, shape, config, kept, tuple(buffers))


def _check_size(settings: Settings, shape: ModelShape, tensors: dict[str, Stored]) -> None:
    """Plausibility check before these numbers are used; names and shapes are compared one by one later."""
    expected, stored = size.parameters(shape), sum(stored.elements for stored in tensors.values())
    if expected > _IMPLAUSIBLE * max(1, stored):
        raise settings.error(
            "num_hidden_layers", f"the model would have {expected:,} parameters, but the files have {stored:,}"
        )


def _tied(family: Family, shape: ModelShape) -> frozenset[str]:
    """Names that an index may list although no file has them: an LM head tied to the embedding."""
    names = {name for mapping in family.mappings for name in mapping.hf if not name.startswith(family.prefix)}
    return frozenset(names) if shape.tied_embeddings else frozenset()


def _tensors(folder: Path, tied: frozenset[str]) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files, from the index or the single file."""
    index = folder / _INDEX
    if index.is_file():
        found = _indexed(folder, index, tied)
        if (folder / _SINGLE).is_file() and folder / _SINGLE not in {stored.file for stored in found.values()}:
            raise UserError(f"{folder}: has {_SINGLE}, and {_INDEX} without it; remove the one that is not the model")
        return found
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: a pickle can run arbitrary code and is not opened; if you trust it, convert it "
            "with AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{folder}: has neither {_INDEX} nor {_SINGLE}; give a folder that save_pretrained has written")


def _indexed(folder: Path, index: Path, tied: frozenset[str]) -> dict[str, Stored]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index}: has no weight_map of names; copy or download it again")
    for name in sorted(set(where.values())):
        if name != Path(name).name or "\\" in name or name in ("", ".", ".."):
            raise UserError(f"{index}: names the file {name!r}, which is outside the folder; do not trust this model")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing, but {index.name} names it; copy or download it")
    found: dict[str, Stored] = {}
    for name in sorted(set(where.values())):
        for tensor, stored in read_header(folder / name).items():
            if where.get(tensor) != name:
                raise UserError(
                    f"{index}: maps {shown(tensor)} to {where.get(tensor)}, but it is in {name}; fix the index"
                )
            found[tensor] = stored
    if missing := sorted(where.keys() - found.keys() - tied):
        raise UserError(f"{index}: names {listed(missing)}, which no file has; copy or download the files again")
    return found


def _full_names(tensors: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """Adds the family's prefix to the names if the files are of the model without LM head."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    heads = {name for mapping in family.mappings for name in mapping.hf if not name.startswith(family.prefix)}
    return {name if name in heads else family.prefix + name: stored for name, stored in tensors.items()}


def listed(names: list[str]) -> str:
    """The first names of a list, and the number of the others."""
    names = [shown(name) for name in names]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
