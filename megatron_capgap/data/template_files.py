"""Reads the chat templates of a tokenizer folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.data import tokenizer_folder

TEMPLATES = "additional_chat_templates"
"""Subfolder with named chat templates."""
DEFAULT, TOOL_USE = "default", "tool_use"
Jinja = str | dict[str, str]
"""A template, or several by name: as in transformers, `tool_use`, if present, is for conversations with tools, and
`default` for others."""


def read_chat_templates(folder: Path) -> tuple[Jinja, Path] | None:
    """The templates of a tokenizer folder and their path; template files take precedence over tokenizer_config.json."""
    file, words = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    found = {DEFAULT: file} if file.is_file() else {}
    found |= {one.name.removesuffix(".jinja"): one for one in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if found:
        texts = {name: _text(one) for name, one in found.items()}
        return _alone(texts), file if file.is_file() else folder / TEMPLATES
    source = tokenizer_folder.read_json(words).get("chat_template")
    if isinstance(source, dict):
        source = [{"name": name, "template": text} for name, text in source.items()]
    if isinstance(source, list):  # several, by name
        source = dict(_named(one, words) for one in source)
        return (_alone(source), words) if source else None
    if source is not None and not isinstance(source, str):
        raise UserError(f"{words}: chat_template is neither a text nor named templates; save the tokenizer again")
    return (source, words) if source else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({in_one_line(error)}); save the tokenizer again") from None


def _alone(templates: dict[str, str]) -> Jinja:
    return templates[DEFAULT] if templates.keys() == {DEFAULT} else templates


def _named(one: Any, place: Path) -> tuple[str, str]:
    name, text = (one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None)
    # The name becomes a file name.
    if not isinstance(name, str) or not isinstance(text, str) or not name or Path(name).name != name:
        raise UserError(
            f"{place}: chat_template has {in_one_line(json.dumps(one))[:60]}, which is not a name with a template; "
            "save the tokenizer again"
        )
    return name, text
