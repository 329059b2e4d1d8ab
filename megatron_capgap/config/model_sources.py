"""Models that are named or described by a file: replaced by their numbers before the configuration is validated."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.catalogue import MODELS, model_named
from megatron_capgap.config.yaml_source import ConfigTree

FolderReader = Callable[[Path], dict[str, Any]]
"""Reads the section `model` from the config.json in a Hugging Face folder."""


def insert_numbers(tree: ConfigTree, read_folder: FolderReader | None) -> None:
    """Replaces `ROLE.model: NAME` and, where a reader is given, `ROLE.checkpoint: NAME` by the numbers of the model.
    NAME is a model of the catalogue or a Hugging Face folder. Problems are added to the tree.

    Args:
        tree: modified in place.
        read_folder: given in `--check` and `--plan`, which need no weights; None in a run.
    """
    for role in ("student", "teacher"):
        section = tree.get(role)
        if not isinstance(section, dict):
            continue
        for name in ("model", "checkpoint"):
            given = section.get(name)
            if not isinstance(given, str) or (name == "checkpoint" and (read_folder is None or not _stands_in(given))):
                continue
            key = f"{role}.{name}"
            try:
                numbers = _numbers(given, read_folder)
            except UserError as error:
                tree.report(tree.mark(key), key, str(error))
                numbers = dict(MODELS["gpt2"])  # any valid one, so that this is the only problem
            section.pop(name)
            if section.get("model") is None and numbers is not None:
                tree.marks[f"{role}.model"] = tree.mark(key)
                section["model"] = numbers
            elif numbers is not None:
                section[name] = given  # both are set: reported by the loader


def _stands_in(checkpoint: str) -> bool:
    """Whether a value of `checkpoint` is no run of ours, but a Hugging Face folder or a name of the catalogue."""
    path = Path(checkpoint)
    return (path / "config.json").is_file() or (not path.exists() and model_named(checkpoint) is not None)


def _numbers(given: str, read_folder: FolderReader | None) -> dict[str, Any]:
    path = Path(given)
    if path.exists() and read_folder is not None:
        return read_folder(path.parent if path.name == "config.json" else path)
    if (found := model_named(given)) is not None:
        return found
    if path.exists():
        raise UserError(f"{given}: only --check and --plan read a config.json; import the model, or give its numbers")
    near = get_close_matches(given.lower(), MODELS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{given}: neither a Hugging Face folder nor a model of the catalogue; {hint}names: {', '.join(MODELS)}"
    )


ASSUMED: dict[str, Any] = {
    "run_dir": "run",
    "data.tokenizer": "tokenizer",
    "data.train": ["data"],
    "data.valid": ["data"],
}
"""Keys that a plan does not depend on."""


def assume_missing(tree: ConfigTree, required: tuple[str, ...]) -> list[str]:
    """Sets the keys of `ASSUMED` that are required and not set.

    Returns:
        One sentence per key.
    """
    said = []
    for key, value in ASSUMED.items():
        needed = key in required or key in ("run_dir", "data.tokenizer")
        if needed and tree.get(key) is None:
            section, _, name = key.rpartition(".")
            inside = tree.values.setdefault(section, {}) if section else tree.values
            if isinstance(inside, dict):
                inside[name] = value
                said.append(f"{key} is not set; nothing here depends on it")
    return said
