"""Description of an architecture: conversion of its configuration, and the mapping of its tensors."""

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
class TensorMapping:
    """A Megatron tensor and the Hugging Face tensors that it consists of."""

    megatron: str
    """Its key in a distributed checkpoint, common to all layers."""
    hf: tuple[str, ...]
    """Names of its parts, in order of rows; `{layer}` is the layer index."""
    packing: str | None = None
    """A key of `PACKINGS`; None for a tensor of one part."""
    transposed: bool = False
    """Whether Hugging Face stores the matrix as `[in, out]`."""


class Settings:
    """Reads a config.json key by key, with errors that name file and key.

    Args:
        file: path for messages.
        content: content of the file.
    """

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self._file = file
        self.content = content

    def get(self, key: str, default: Any) -> Any:
        """The value of a key, or the default if it is missing or null."""
        value = self.content.get(key)
        return default if value is None else value

    def require(self, key: str) -> Any:
        """The value of a required key."""
        if self.content.get(key) is None:
            raise self.error(key, "is missing; save the model again")
        return self.content[key]

    def section(self, key: str) -> dict[str, Any]:
        """The object under a key, empty if it is missing or null."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"{json.dumps(value)} is not an object; save the model again")
        return value

    def names(self, key: str) -> list[str]:
        """The list of names under a key, empty if it is missing or null."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(key, f"{json.dumps(value)} is not a list of names; save the model again")
        return value

    def require_one_of(self, key: str, supported: tuple[Any, ...], default: Any) -> None:
        """Raises if the value is not supported."""
        if (value := self.get(key, default)) not in supported:
            allowed = " or ".join(json.dumps(one) for one in supported)
            raise self.error(key, f"{json.dumps(value)} is not supported, {allowed} is; convert another model")

    def error(self, key: str, text: str) -> UserError:
        """An error about one key."""
        return UserError(f"{self._file}: {key}: {text}")


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture."""

    name: FamilyName
    """`model_type` in config.json; a key of `config.architectures.ARCHITECTURES`."""
    architecture: str
    """Model class with the LM head."""
    prefix: str
    """Prefix of all tensor names except the LM head; files of the model without head omit it."""
    mappings: tuple[TensorMapping, ...]
    """Mapping of every tensor."""
    buffers: tuple[str, ...]
    """Regular expressions of non-weight tensors in older files."""
    shape: Callable[[Settings], dict[str, Any]]
    """Fields of `ModelShape` from config.json.

    Raises:
        UserError: a value is not supported.
    """
    config: Callable[[ModelShape, int], dict[str, Any]]
    """Keys of config.json from the shape and the maximum sequence length."""

    def mappings_of(self, shape: ModelShape) -> tuple[TensorMapping, ...]:
        """The mapping for a shape: without the LM head if it is tied to the embedding."""
        return tuple(
            mapping
            for mapping in self.mappings
            if not (shape.tied_embeddings and mapping.megatron == "output_layer.weight")
        )
