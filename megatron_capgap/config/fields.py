"""Schema as a flat table: one row per dotted key, generated from the dataclasses for loader and help."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from megatron_capgap.config.schema import Config

Node = dict[str, Any]  # node of a JSON schema

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True)
class Field:
    """One key of a configuration file."""

    name: str
    """Dotted name, for example student.layout.tensor; the empty string for the root."""
    type: str
    """Allowed type and bounds, in words."""
    doc: str
    """Docstring of the field."""
    required: bool
    """Whether the key must be set if its section is present."""
    default: str | None
    """Default in YAML notation; None for required keys and for sections that cannot be null."""
    children: tuple[str, ...]
    """Keys of a section; empty for a value."""
    choices: tuple[str, ...]
    """Allowed words; empty if there is no such list."""


@cache
def adapter() -> TypeAdapter[Config]:
    """Validator of the whole schema; cached, because building it takes 0.1 s."""
    return TypeAdapter(Config)


@cache
def table() -> dict[str, Field]:
    """All keys by dotted name, in schema order, each section before its keys; the root is `""`."""
    schema = adapter().json_schema()
    rows: dict[str, Field] = {}
    _add_rows(rows, "", schema, schema["$defs"], required=True)
    return rows


def join(section: str, key: str) -> str:
    """Dotted name of `key` in `section`."""
    return f"{section}.{key}" if section else key


DEFAULT = "default"
"""Source of a key that was not set."""


def location(source: str, key: str) -> str:
    """Prefix of a message: `distill.yaml:7: train.steps`, `--train.steps`, or `train.steps (the default)`."""
    if source == DEFAULT:
        return f"{key} (the default)"
    return source if not key or source == f"--{key}" else f"{source}: {key}"


def section_name(section: str) -> str:
    """Name of a section in messages."""
    return section or "the top level"


def _add_rows(rows: dict[str, Field], name: str, node: Node, definitions: Node, required: bool) -> None:
    target = _target(node, definitions)
    properties = target.get("properties", {})
    rows[name] = Field(
        name=name,
        type=_words(node, definitions),
        doc=node["description"] if "description" in node else target.get("description", ""),
        required=required,
        default=json.dumps(node["default"]).strip('"') if "default" in node else None,
        children=tuple(properties),
        choices=_choices(target),
    )
    for child, inner in properties.items():
        _add_rows(rows, join(name, child), inner, definitions, child in target.get("required", ()))


def _target(node: Node, definitions: Node) -> Node:
    """The node with references resolved, without `or null`; of a list, its item."""
    if "anyOf" in node:
        node = next(option for option in node["anyOf"] if option.get("type") != "null")
    node = node.get("items", node)
    return definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _choices(node: Node) -> tuple[str, ...]:
    return tuple(node.get("enum", [node["const"]] if "const" in node else []))


def _words(node: Node, definitions: Node) -> str:
    """Type and bounds of a JSON-schema node, in words."""
    if "anyOf" in node:
        return " or ".join(_words(option, definitions) for option in node["anyOf"])
    if "$ref" in node or "properties" in node:
        return "a section"
    if choices := _choices(node):
        return "one of " + ", ".join(choices) if len(choices) > 1 else choices[0]
    if "prefixItems" in node:
        items = [_words(item, definitions) for item in node["prefixItems"]]
        return f"a list of {len(items)}: {', '.join(items)}"
    if node["type"] == "array":
        return f"a list, each entry {_words(node['items'], definitions)}"
    bounds = " and ".join(f"{sign} {node[bound]:g}" for bound, sign in _BOUNDS.items() if bound in node)
    word = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a string"}
    return f"{word.get(node['type'], node['type'])} {bounds}".rstrip()
