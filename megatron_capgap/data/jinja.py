"""Chat templates in Jinja, in the sandbox and with the helpers that transformers gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Span = tuple[int, int]
"""Characters of a text: from, to."""
_NEXT = "\ue0f3\ue0f4"  # private characters, which no text holds: they mark where a loop goes on


class Rendering(NamedTuple):
    """What a template writes."""

    text: str
    said: list[Span]
    """What `{% generation %}` marks."""


class TemplateSource:
    """One template.

    Raises:
        TemplateError or RecursionError: it is no Jinja.
    """

    def __init__(self, text: str) -> None:
        self.marked = bool(re.search(r"{%[-+]?\s*generation\s*[-+]?%}", text))
        """Whether it says itself what the assistant writes."""
        self._text = text
        self._sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self._sandbox.globals["raise_exception"] = _refuse
        self._sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._sandbox.filters["tojson"] = _to_json
        self._template = self._sandbox.from_string(text)

    def render(self, values: dict[str, Any]) -> Rendering:
        """What it writes; it is a program of somebody else's and may raise anything."""
        tracker = self._sandbox.extensions[_Generation.identifier]
        assert isinstance(tracker, _Generation)
        tracker.written, tracker.said, blocks = 0, [], []
        for block in self._template.generate(values):
            blocks.append(block)
            tracker.written += len(block)
        return Rendering("".join(blocks), tracker.said)

    def turns(self, values: dict[str, Any], text: str) -> list[int]:
        """Where in the text that it writes each round of its outer loops begins and the last one ends: there one
        message ends and the next begins. Empty where that cannot be told."""
        found = self._looped.render(values).split(_NEXT)
        if "".join(found) != text:  # such as where a loop's text is counted
            return []
        places, at = [], 0
        for part in found[:-1]:
            at += len(part)
            places.append(at)
        return places

    @cached_property
    def _looped(self) -> Any:
        """The template with marks where its outer loops go on."""
        tree = self._sandbox.parse(self._text)
        _mark_loops(tree.body)
        return self._sandbox.from_string(tree)


class _Generation(Extension):
    """transformers' `{% generation %}`: what the assistant writes.

    Attributes:
        written: characters of the text so far.
        said: where the marked parts stand, as transformers counts.
    """

    tags: ClassVar = {"generation"}  # type: ignore[misc]  # jinja2 annotates it as an instance's
    written: int
    said: list[Span]

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.written, self.said = 0, []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.said.append((self.written, self.written + len(text)))
        return text


def _mark_loops(body: list[nodes.Node]) -> None:
    for place in reversed(range(len(body))):
        node = body[place]
        if isinstance(node, nodes.For):
            node.body.insert(0, _mark(node))
            body.insert(place + 1, _mark(node))
        elif isinstance(node, nodes.If):
            for part in (node.body, node.elif_, node.else_):
                _mark_loops(part)  # type: ignore[arg-type]


def _mark(node: nodes.Node) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(_NEXT)]).set_lineno(node.lineno)


def _refuse(reason: str) -> None:
    raise TemplateError(reason)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
