"""What a family has to say: its configuration both ways, and a table of where each tensor goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.architectures import FamilyName
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import packing
from megatron_capgap.models.packing import PackedRows

PACKINGS: dict[str, Callable[[ModelShape], list[PackedRows]]] = {
    "qkv": packing.qkv,
    "qkv_stacked": packing.qkv_stacked,
    "gate_up": packing.gate_up,
}


@dataclass(frozen=True)
class Row:
    """One tensor of Megatron's and what it is made of there."""

    megatron: str
    """Its key in a distributed checkpoint; that of all layers together."""
    hf: tuple[str, ...]
    """Names of its parts, from top to bottom; `{layer}` stands for the number of the layer."""
    packing: str | None = None
    """A row of `PACKINGS`; None for a tensor of one part."""
    transposed: bool = False
    """Whether they keep the matrix `[in, out]`."""


class Settings:
    """A config.json, read key by key with errors that name it.

    Args:
        file: for messages.
        content: the object in it.
    """

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self._file = file
        self.content = content

    def get(self, key: str, default: Any) -> Any:
        """The value, or what the family takes where it is missing or null."""
        value = self.content.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of a key that every model of the family has."""
        if self.content.get(key) is None:
            raise self.wrong(key, "is missing; save the model again")
        return self.content[key]

    def section(self, key: str) -> dict[str, Any]:
        """The object behind a key, empty where it is missing or null."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, f"{json.dumps(value)} is no object; save the model again")
        return value

    def names(self, key: str) -> list[str]:
        """The list of names behind a key, empty where it is missing or null."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, f"{json.dumps(value)} is no list of names; save the model again")
        return value

    def demand(self, key: str, supported: tuple[Any, ...], default: Any) -> None:
        """Refuses any value but the supported ones."""
        if (value := self.get(key, default)) not in supported:
            allowed = " or ".join(json.dumps(one) for one in supported)
            raise self.wrong(key, f"{json.dumps(value)} is not supported, {allowed} is; convert another model")

    def wrong(self, key: str, text: str) -> UserError:
        """An error about one key."""
        return UserError(f"{self._file}: {key}: {text}")


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's."""

    name: FamilyName
    """`model_type` in config.json; a row of `config.families`."""
    architecture: str
    """Class with the LM head."""
    prefix: str
    """What the names of all tensors but the LM head begin with; checkpoints of the bare model leave it out."""
    rows: tuple[Row, ...]
    """Where every tensor goes."""
    buffers: tuple[str, ...]
    """Regular expressions of tensors that are no weights, which older files carry."""
    shape: Callable[[Settings], dict[str, Any]]
    """Fields of `ModelShape` from config.json.

    Raises:
        UserError: a value that this project does not compute.
    """
    config: Callable[[ModelShape, int], dict[str, Any]]
    """Keys of config.json that the shape and the longest sequence decide."""

    def rows_of(self, shape: ModelShape) -> tuple[Row, ...]:
        """The table without the LM head where that is the input embedding."""
        return tuple(row for row in self.rows if not (shape.tied_embeddings and row.megatron == "output_layer.weight"))
