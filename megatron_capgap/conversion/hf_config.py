"""Reads the config.json of a Hugging Face folder as untrusted input. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES as TRAITS
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion.family import Family, Settings
from megatron_capgap.conversion.registry import FAMILIES

_LARGEST_JSON = 32 << 20


def read_shape(folder: Path) -> ModelShape:
    """Shape of the model in a Hugging Face folder, of which config.json suffices.

    Raises:
        UserError: the file is missing or damaged, or the model is not supported.
    """
    return read_config(folder / "config.json", read_json(folder / "config.json"))[1]


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a small JSON file.

    Raises:
        UserError: the file is missing, damaged or does not contain an object.
    """
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise UserError(f"{file}: larger than {_LARGEST_JSON} bytes; it is not such a file")
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; give a folder that save_pretrained has written") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: contains {type(content).__name__}, not an object; copy or download it again")
    return content


def read_config(file: Path, config: dict[str, Any]) -> tuple[Family, ModelShape]:
    """Family and shape of a config.json.

    Args:
        file: path for messages.
        config: its content.

    Raises:
        UserError: an architecture or a value is not supported.
    """
    settings = Settings(file, config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise settings.error("model_type", f"{kind!r} is not supported; valid values: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for name in settings.names("architectures"):
        if name not in (family.architecture, family.architecture.replace("ForCausalLM", "Model").replace("LMHead", "")):
            raise settings.error("architectures", f"{name!r} is not supported, {family.architecture} is")
    if config.get("quantization_config") is not None:
        raise settings.error(
            "quantization_config", "quantised weights are not supported; convert the unquantised model"
        )
    try:
        shape = TypeAdapter(ModelShape).validate_python({"family": kind, **family.shape(settings)})
    except ValidationError as error:
        first = error.errors()[0]
        raise settings.error(".".join(map(str, first["loc"])), f"{first['input']!r}: {first['msg']}") from None
    _check_heads(settings, shape)
    return family, shape


def _check_heads(settings: Settings, shape: ModelShape) -> None:
    if shape.heads % derived.kv_heads(shape):
        raise settings.error("num_key_value_heads", f"{shape.kv_heads} does not divide {shape.heads} heads")
    if shape.head_dim is None and shape.hidden % shape.heads:
        raise settings.error("hidden_size", f"{shape.hidden} is not a multiple of {shape.heads} heads")
    width = derived.head_dim(shape)
    turned = int(width * shape.rotary_share)
    if not TRAITS[shape.family].learned_positions and (turned == 0 or turned % 2):
        raise settings.error(
            "head_dim", f"rotary positions rotate {turned} channels of a head, which is not a positive even number"
        )
