"""User input as nested dicts: the YAML file and command-line overrides, with the source location of every key.

Scalars follow YAML 1.2: `3e-4` is a number, `no` is a string, `010` is ten. Whole floats become integers, so `1e6` is
valid for an integer key.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_capgap.config.fields import join, location

_NULL, _BOOL, _INT, _FLOAT, _STRING, _LIST, _MAPPING = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
)
_AFTER_THE_FILE = 1 << 30
_LARGEST_EXACT = 2**53
_IN_MEMORY = "the configuration"


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)


class Dumper(yaml.SafeDumper):
    """Quotes every string that `Loader` or a YAML 1.1 reader would parse as another type."""


for _tag, _pattern, _first in (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9](_?[0-9]){0,19}", list("-+0123456789")),  # 64 bits; longer numbers become floats
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
):
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True, order=True)
class SourceLocation:
    """A location in the file or on the command line; sorts by line, the command line last."""

    line: int
    text: str
    """The location in messages: `distill.yaml:7` or `--student.layout.tensor`."""


@dataclass
class ConfigTree:
    """A configuration as the user wrote it, not yet validated."""

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, SourceLocation] = field(default_factory=dict)
    """Location at which each dotted key or section was set last."""
    problems: list[tuple[SourceLocation, str]] = field(default_factory=list)
    """Errors found while reading, with their locations."""

    def mark(self, key: str) -> SourceLocation:
        """Location of `key` or of its nearest enclosing section; otherwise the file."""
        while key and key not in self.marks:
            key = key.rpartition(".")[0]
        return self.marks.get(key, SourceLocation(0, self.path))

    def get(self, key: str) -> Any:
        """Value of a dotted key; None if it is not set."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def report(self, mark: SourceLocation, key: str, problem: str) -> None:
        """Adds a problem with a dotted key (or "" for none); unprintable characters are escaped."""
        text = f"{location(mark.text, key)}: {problem}"
        self.problems.append((mark, "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)))


def read_file(path: str) -> ConfigTree:
    """Reads one YAML file; errors are added to the tree's `problems`."""
    tree, start = ConfigTree(path), SourceLocation(0, path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        tree.report(start, "", f"cannot read the configuration: {reason}; pass a YAML file to --config")
        return tree
    _read(tree, text, start, lambda line: SourceLocation(line, f"{path}:{line}"))
    return tree


def read_mapping(values: Mapping[str, Any]) -> ConfigTree:
    """Reads a configuration that is in memory; errors are added to the tree's `problems`."""
    tree, start = ConfigTree(_IN_MEMORY), SourceLocation(0, _IN_MEMORY)
    try:
        text = yaml.dump(json.loads(json.dumps(values, default=os.fspath)), Dumper=Dumper, sort_keys=False)
    except TypeError as error:
        tree.report(start, "", f"cannot be written as YAML ({error}); use numbers, strings, lists and dicts")
        return tree
    _read(tree, text, start, lambda line: SourceLocation(line, _IN_MEMORY))
    return tree


def _read(tree: ConfigTree, text: str, start: SourceLocation, mark: Callable[[int], SourceLocation]) -> None:
    """Fills the tree with the content of a YAML text."""
    reader = _Reader(tree, mark)
    node = reader.compose(text)
    if isinstance(node, yaml.MappingNode):
        tree.values = reader.mapping(node, "", ())
    elif not tree.problems:
        tree.report(start, "", "the file is empty or not a mapping; write keys such as `run_dir: runs/one`")


def override(tree: ConfigTree, argument: str, number: int) -> None:
    """Applies one `--section.key=value`: the value is YAML, missing sections are created, later overrides take
    precedence.

    Args:
        tree: modified in place.
        argument: the override as written on the command line.
        number: its index among the overrides.
    """
    name, equals, text = argument.partition("=")
    key, mark = name.removeprefix("--"), SourceLocation(_AFTER_THE_FILE + number, name)
    if not equals:
        tree.report(mark, "", f"no value given; use {name}=VALUE")
        return
    reader = _Reader(tree, lambda line: mark)
    node = reader.compose(text)
    if node is None and text.strip():
        return
    *sections, last = key.split(".")
    inside, prefix = tree.values, ""
    for section in sections:
        prefix = join(prefix, section)
        if inside.get(section) is None:
            inside[section] = {}
            tree.marks[prefix] = mark
        inside = inside[section]
        if not isinstance(inside, dict):
            location = tree.mark(prefix).text
            tree.report(mark, key, f"{prefix} is {inside!r} ({location}), not a section; remove one of them")
            return
    tree.marks = {marked: where for marked, where in tree.marks.items() if not f"{marked}.".startswith(f"{key}.")}
    tree.marks[key] = mark
    inside[last] = None if node is None else reader.value(node, key, ())


class _Reader:
    """Converts YAML nodes to plain values and records the location of each key in a tree."""

    def __init__(self, tree: ConfigTree, mark: Callable[[int], SourceLocation]) -> None:
        self.tree = tree
        self.mark = mark
        self.flattened: set[yaml.MappingNode] = set()

    def compose(self, text: str) -> yaml.Node | None:
        """The root node; None for an empty text or after a syntax error, which is reported."""
        try:
            self.loader = Loader(text)
            return self.loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            problem = f"not YAML: {error.problem}; fix the syntax on this line or the one above"
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            problem = f"not YAML: the character {chr(error.character)!a} is not allowed; remove it"
        self.tree.report(self.mark(line), "", problem)
        return None

    def mapping(self, node: yaml.MappingNode, section: str, around: tuple[yaml.Node, ...]) -> dict[str, Any]:
        """A mapping with plain string keys; duplicate keys are reported, `<<` merges an anchor."""
        if node not in self.flattened:
            self._flatten(node, section)
        values = {}
        for name, inner in node.value:
            if isinstance(name, yaml.ScalarNode):
                key = join(section, name.value)
                self.tree.marks[key] = self._mark(name)
                values[name.value] = self.value(inner, key, (*around, node))
        return values

    def _flatten(self, node: yaml.MappingNode, section: str) -> None:
        """Reports invalid keys of a mapping and merges its `<<`; once per node, however often it is aliased."""
        self.flattened.add(node)
        first: dict[str, SourceLocation] = {}
        for name, _ in node.value:
            mark = self._mark(name)
            if not isinstance(name, yaml.ScalarNode):
                self.tree.report(mark, section, "a key must be a scalar")
            elif name.value in first:
                key, before = join(section, name.value), first[name.value].text
                self.tree.report(mark, key, f"duplicate key, first set at {before}; keep one of them")
            else:
                first[name.value] = mark
        try:
            self.loader.flatten_mapping(node)
        except yaml.MarkedYAMLError as error:
            self.tree.report(self._mark(node), section, f"cannot merge: {error.problem}")

    def value(self, node: yaml.Node, key: str, around: tuple[yaml.Node, ...]) -> Any:
        """The plain value of any node.

        Args:
            node: from this reader's `compose`.
            key: its dotted name.
            around: its enclosing nodes; an anchor that contains itself is reported.
        """
        if any(node is outer for outer in around):
            self.tree.report(self._mark(node), key, "the anchor contains itself")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if node.tag != (_MAPPING if isinstance(node, yaml.MappingNode) else _LIST):
            self.tree.report(self._mark(node), key, f"the tag {node.tag} is not supported; remove it")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key, around)
        return [self.value(item, join(key, str(i)), (*around, node)) for i, item in enumerate(node.value)]

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        plain = node.style is None
        tag = self.loader.resolve(yaml.ScalarNode, node.value, (plain, not plain))
        if node.tag != tag:
            self.tree.report(self._mark(node), key, f"the tag {node.tag} is not supported; quote the value instead")
            return node.value
        if tag == _NULL:
            return None
        if tag == _BOOL:
            return node.value.lower() == "true"
        if tag == _INT:
            return int(node.value)
        if tag == _FLOAT:
            number = float(node.value)
            return int(number) if number.is_integer() and abs(number) <= _LARGEST_EXACT else number
        return node.value

    def _mark(self, node: yaml.Node) -> SourceLocation:
        return self.mark(node.start_mark.line + 1)
