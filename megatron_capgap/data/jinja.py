"""Renders Jinja chat templates with the same sandbox and helpers as transformers."""

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
"""Characters of a text: (start, end)."""
_NEXT = "\ue0f3\ue0f4"  # private-use characters that no text contains: mark loop iterations


class Rendering(NamedTuple):
    """Output of a template."""

    text: str
    assistant_spans: list[Span]
    """Spans that `{% generation %}` marks."""


class TemplateSource:
    """One compiled template.

    Raises:
        TemplateError or RecursionError: the text is not valid Jinja.
    """

    def __init__(self, text: str) -> None:
        self.marked = bool(re.search(r"{%[-+]?\s*generation\s*[-+]?%}", text))
        """Whether the template marks the assistant's text with `{% generation %}`."""
        self._text = text
        self._sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self._sandbox.globals["raise_exception"] = _refuse
        self._sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._sandbox.filters["tojson"] = _to_json
        self._template = self._sandbox.from_string(text)

    def render(self, values: dict[str, Any]) -> Rendering:
        """Renders the template; it is third-party code and may raise anything."""
        tracker = self._sandbox.extensions[_Generation.identifier]
        assert isinstance(tracker, _Generation)
        tracker.rendered_length, tracker.assistant_spans, blocks = 0, [], []
        for block in self._template.generate(values):
            blocks.append(block)
            tracker.rendered_length += len(block)
        return Rendering("".join(blocks), tracker.assistant_spans)

    def turns(self, values: dict[str, Any], text: str) -> list[int]:
        """Positions in the rendered text where an iteration of an outer loop begins or the last one ends, which are the
        boundaries between messages. Empty if they cannot be found."""
        found = self._looped.render(values).split(_NEXT)
        if "".join(found) != text:  # for example the template counts a loop's text
            return []
        places, at = [], 0
        for part in found[:-1]:
            at += len(part)
            places.append(at)
        return places

    @cached_property
    def _looped(self) -> Any:
        """The template with marks at the iterations of its outer loops."""
        tree = self._sandbox.parse(self._text)
        _mark_loops(tree.body)
        return self._sandbox.from_string(tree)


class _Generation(Extension):
    """transformers' `{% generation %}` tag, which marks the assistant's text.

    Attributes:
        rendered_length: characters rendered so far.
        assistant_spans: spans of the marked parts, counted as in transformers.
    """

    tags: ClassVar = {"generation"}  # type: ignore[misc]  # jinja2 annotates it as an instance's
    rendered_length: int
    assistant_spans: list[Span]

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.rendered_length, self.assistant_spans = 0, []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.assistant_spans.append((self.rendered_length, self.rendered_length + len(text)))
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
