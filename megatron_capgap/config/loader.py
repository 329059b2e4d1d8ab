"""Configuration loader: a YAML file and command-line overrides to one validated `Config`, and back to YAML.

All mistakes are collected before an error is raised; each is one line with location, key, value and valid values.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_capgap.common.errors import ConfigError, in_one_line
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.config.fields import DEFAULT, adapter, join, location, section_name, table
from megatron_capgap.config.model_sources import FolderReader, assume_missing, insert_numbers
from megatron_capgap.config.schema import Config
from megatron_capgap.config.yaml_source import ConfigTree, Dumper, override, read_file, read_mapping

# A word that is a key of another section counts as a typo of this section only at the higher similarity.
_SURELY_A_TYPO = 0.8
_PERHAPS_A_TYPO = 0.5


@dataclass(frozen=True)
class StageRequirements:
    """Requirements of a stage beyond the schema."""

    required: tuple[str, ...]
    """Keys that must be set and not be empty."""
    unread: tuple[str, ...]
    """Sections that the stage does not read."""
    student: bool = True
    """Whether student.checkpoint or student.model must be set; a stage that creates the student refuses both."""


STAGE_REQUIREMENTS = {
    "adapt": StageRequirements(
        required=("train.steps", "data.train"), unread=("teacher", "prune", "finetune", "objective")
    ),
    "prune": StageRequirements(
        required=("teacher", "prune", "data.train"), unread=("finetune", "objective", "profile", "track"), student=False
    ),
    "distill": StageRequirements(required=("train.steps", "data.train", "teacher"), unread=("prune", "finetune")),
    "finetune": StageRequirements(required=("student.checkpoint", "data.train"), unread=("prune",)),
    "evaluate": StageRequirements(required=("data.valid",), unread=("teacher", "prune", "objective", "profile")),
}

_MISSING_KEYS = {
    "teacher": "has no teacher",
    "prune": "does not prune",
    "finetune": "reads no conversations",
    "profile": "has no training steps",
    "track": "has no metrics",
}
"""Reason why a stage refuses a section that it does not read."""


@dataclass(frozen=True)
class LoadedConfig:
    """A validated configuration and the source of each key."""

    config: Config
    sources: dict[str, str]
    """Source of each dotted key that the user set: `distill.yaml:7`, or `--train.steps` for an override."""
    assumptions: tuple[str, ...] = ()
    """What a plan assumes in place of keys that are not set."""

    def source(self, key: str) -> str:
        """Source of `key`, or of the nearest enclosing section; `default` if neither was set."""
        while key and key not in self.sources:
            key = key.rpartition(".")[0]
        return self.sources.get(key, DEFAULT)

    def location(self, key: str) -> str:
        """Prefix of a message about `key`: `distill.yaml:7: train.steps`, `--train.steps`, or `train.steps (the
        default)`."""
        return location(self.source(key), key)


def load(
    source: str | Mapping[str, Any] | Config,
    overrides: Sequence[str],
    stage: str,
    read_folder: FolderReader | None = None,
    assume: bool = False,
) -> LoadedConfig:
    """Reads and validates the configuration of one stage.

    Args:
        source: the YAML file, or a configuration in memory.
        overrides: `--section.key=value` each, the value in YAML; they take precedence over the file, later ones over
            earlier ones.
        stage: a name from `schema.STAGES`.
        read_folder: reads the numbers of a model in a Hugging Face folder; given if the stage does not run, so that
            numbers may stand in for every checkpoint.
        assume: whether keys that a plan does not depend on may be missing.

    Raises:
        ConfigError: one line per mistake, in file order.
    """
    if isinstance(source, str):
        tree = read_file(source)
    else:
        tree = read_mapping(plain(source) if isinstance(source, Config) else source)
    unreadable = bool(tree.problems) and not tree.values
    for number, words in enumerate(overrides):
        override(tree, words, number)
    config = None
    if not STAGE_REQUIREMENTS[stage].student:
        tree.values.setdefault("student", {})
    assumptions = list[str]()
    if not unreadable:
        insert_numbers(tree, read_folder)
        assumptions += assume_missing(tree, STAGE_REQUIREMENTS[stage].required) if assume else []
        config = _validate(tree)
        for key, problem in _unmet_needs(tree, stage, plans=read_folder is not None, assume=assume):
            tree.report(tree.mark(key), key, problem)
    if config is None or tree.problems:
        raise ConfigError([text for _, text in sorted(tree.problems, key=lambda problem: problem[0].line)])
    return LoadedConfig(config, {key: mark.text for key, mark in tree.marks.items()}, tuple(assumptions))


def dump(config: Config, path: str) -> None:
    """Writes the configuration to `path` atomically, keys in schema order; `load` reads back an equal object."""
    text = yaml.dump(plain(config), Dumper=Dumper, sort_keys=False, width=110)
    write_atomically(Path(path), text)


def changes(config: Config, path: Path) -> list[str]:
    """Differences from a configuration that `dump` wrote to `path`, each as `train.steps 20 -> 40`; empty if the file
    is missing or not YAML."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return list(_differences(before, plain(config), ""))


def plain(config: Config) -> dict[str, Any]:
    """The configuration as YAML mappings and lists."""
    return json.loads(json.dumps(asdict(config)))


def _differences(before: Any, now: Any, key: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), join(key, name))
    elif before != now:
        yield f"{key} {json.dumps(before)} -> {json.dumps(now)}"


def nearest(word: str, candidates: Sequence[str], cutoff: float = _PERHAPS_A_TYPO) -> str | None:
    """The candidate most similar to `word`; None if none is close."""
    return next(iter(get_close_matches(word, candidates, n=1, cutoff=cutoff)), None)


def _validate(tree: ConfigTree) -> Config | None:
    """The configuration, or None after reporting every key that violates the schema."""
    try:
        # JSON: pydantic's strict mode accepts lists for tuples and mappings for dataclasses only in JSON input.
        return adapter().validate_json(json.dumps(tree.values), strict=True)
    except ValidationError as errors:
        for error in errors.errors(include_url=False, include_context=False):
            names = [str(part) for part in error["loc"] if isinstance(part, str)]
            key, section = ".".join(names), ".".join(names[:-1])
            at_item = isinstance(error["loc"][-1], int)
            # Includes indices of enclosing lists, but not of the item itself; the table has no indices.
            where = ".".join(map(str, error["loc"][:-1] if at_item else error["loc"]))
            if error["type"] == "unexpected_keyword_argument":
                tree.report(tree.mark(where), where, _unknown(section, where.rpartition(".")[0], names[-1]))
            elif error["type"] == "missing" and not at_item:
                row = table()[key]
                tree.report(tree.mark(where), where, f"missing; expected {row.type}: {in_one_line(row.doc)}")
            else:
                tree.report(tree.mark(where), where, _type_errors(key, error["input"]))
        return None


def _unknown(section: str, inside: str, word: str) -> str:
    """Message for a key that `section` does not have; `inside` is the section with list indices."""
    if "." in word:
        return "dotted keys are allowed on the command line only; in a file, nest the sections"
    siblings = table()[section].children
    elsewhere = [key for key in table() if key == word or key.endswith(f".{word}")]
    if near := nearest(word, siblings, _SURELY_A_TYPO if elsewhere else _PERHAPS_A_TYPO):
        return f"unknown key; did you mean {join(inside, near)}?"
    if elsewhere:
        return f"unknown key in {section_name(section)}; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key; valid keys of {section_name(section)}: {', '.join(siblings)}"


def _type_errors(key: str, given: Any) -> str:
    """Message for a value of the wrong type or out of bounds."""
    row = table()[key]
    shown = json.dumps(given)
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    hint = ""
    if isinstance(given, str) and (near := nearest(given, row.choices)):
        hint = f"did you mean {near}? "
    elif row.children:
        hint = f"keys: {', '.join(row.children)}; "
    elif row.type.startswith("a string") and isinstance(given, int | float):
        hint = "quote it; "
    return f"{shown} given; {hint}expected {row.type}"


def _unmet_needs(tree: ConfigTree, stage: str, *, plans: bool, assume: bool) -> Iterator[tuple[str, str]]:
    """Keys that the stage requires and that are not set, and keys that are set and that it does not read."""
    needs = STAGE_REQUIREMENTS[stage]
    for key in needs.required:
        stands_in = plans and key == "student.checkpoint" and tree.get("student.model") is not None
        if tree.get(key) in (None, [], {}) and not stands_in and not (assume and key == "train.steps"):
            expected_type = table()[key].type.removesuffix(" or null")
            yield key, f"required by {stage}; expected {expected_type}: {in_one_line(table()[key].doc)}"
    for section, lack in _MISSING_KEYS.items():
        if section in needs.unread and tree.get(section) is not None:
            yield section, f"{stage} {lack}; remove the section"
    yield from _teacher_source(tree, plans)
    given = [name for name in ("checkpoint", "model") if tree.get(f"student.{name}") is not None]
    if not needs.student:
        for name in given:
            yield f"student.{name}", f"{stage} creates the student from teacher.checkpoint; remove the key"
    elif not given and "student.checkpoint" in needs.required:
        return  # reported above
    elif len(given) != 1 and isinstance(tree.get("student"), dict):
        which = "both" if given else "neither"
        yield "student", f"{which} of checkpoint and model set; set exactly one of them"


def _teacher_source(tree: ConfigTree, plans: bool) -> Iterator[tuple[str, str]]:
    """A teacher has a checkpoint; numbers stand in for it where no weights are needed."""
    if not isinstance(tree.get("teacher"), dict) or not tree.get("teacher"):
        return
    checkpoint, model = (tree.get(f"teacher.{name}") is not None for name in ("checkpoint", "model"))
    if checkpoint and model:
        yield "teacher", "both of checkpoint and model set; set exactly one of them"
    elif model and not plans:
        yield (
            "teacher.model",
            "numbers stand in for a teacher in --check and --plan only, this run needs its weights; "
            "set teacher.checkpoint instead",
        )
    elif not checkpoint and not model:
        yield "teacher.checkpoint", f"missing; expected a string: {in_one_line(table()['teacher.checkpoint'].doc)}"
