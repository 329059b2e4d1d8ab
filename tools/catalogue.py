"""Reads models from YAML files: a catalogue of teachers, the grid of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import size


def read_catalogue(path: Path, count: str) -> dict[str, float]:
    """Parameter count of each teacher, by `line/member`.

    Raises:
        UserError: the file does not exist, or a member is not a valid model.
    """
    sizes = {}
    for name, model in read_models(path).items():
        try:
            sizes[name] = parameters(model, count)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join((*name.split("/", 1), *map(str, first["loc"])))
            raise UserError(f"--catalogue {path}: {key}: {first['msg']}; fix or remove this member") from None
    return sizes


def read_models(path: Path) -> dict[str, Any]:
    """The model sections of a catalogue, by `line/member`."""
    lines = read_yaml("--catalogue", path)
    if not isinstance(lines, Mapping) or not all(isinstance(members, Mapping) for members in lines.values()):
        raise UserError(f"--catalogue {path}: expected LINE: {{MEMBER: {{layers: ..., hidden: ..., ...}}}}")
    return {f"{line}/{member}": model for line, members in lines.items() for member, model in members.items()}


def read_yaml(option: str, path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{option} {path}: cannot be read ({reason}); pass a YAML file") from None


def parameters(model: Any, count: str) -> float:
    """Parameter count of a model section."""
    counted = size.non_embedding_parameters if count == "non-embedding" else size.parameters
    return float(counted(TypeAdapter(ModelShape).validate_python(model)))
