"""Templates that turn a conversation into text and ids, and tell what of it the assistant says."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_capgap.config.errors import UserError, in_one_line
from megatron_capgap.data.tokenizer import Tokenizer
from megatron_capgap.data.turns import Conversation, Message

Span = tuple[int, int]
"""Characters of a text: from, to."""
TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer with chat templates by name."""
Jinja = str | dict[str, str]
"""A template, or several by name: as transformers does, `tool_use` is taken, where there is one, for a conversation
that names tools, and `default` for the others."""
_DEFAULT, _TOOL_USE = "default", "tool_use"
# Private characters, which no text holds: they mark what {% generation %} has written, and stand for a message.
_FROM, _TO, _SOMETHING = "\ue0f0\ue0f1", "\ue0f1\ue0f0", "\ue0f2"


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a conversation."""

    tokens: tuple[int, ...]
    learned: bool
    """Whether the loss counts them: the assistant says them."""


class Template(ABC):
    """How a conversation is written down for a tokenizer.

    Attributes:
        jinja: the same in the language of Hugging Face's tokenizers.
    """

    jinja: Jinja

    @abstractmethod
    def encode(self, messages: Sequence[Message]) -> list[Segment]:
        """Tokens from the beginning on; after a last message of the user's, up to where the assistant begins."""

    @abstractmethod
    def ends(self) -> frozenset[int]:
        """Ids that the template writes where the assistant's turn ends; a text that is generated ends there too."""


class JinjaTemplate(Template):
    """A template in Jinja, in the sandbox and with the helpers that transformers gives it.

    The whole conversation becomes text and then ids, as in transformers' `apply_chat_template`: what a tokenizer makes
    of a piece depends on what stands before it. The assistant's words are what `{% generation %}` marks, or, without
    such marks, from where the template leaves the assistant to begin to the end of its turn.

    Args:
        source: the template, or several by name; one that is neither `default` nor `tool_use` is only handed on.
        tokenizer: gives bos_token, eos_token and the like as text.
        place: what messages call it.

    Raises:
        UserError: it is no Jinja.
    """

    def __init__(self, source: Jinja, tokenizer: Tokenizer, place: str) -> None:
        self.jinja = source
        self._tokenizer, self._place = tokenizer, place
        named = {_DEFAULT: source} if isinstance(source, str) else source
        used = {name: named[name] for name in (_DEFAULT, _TOOL_USE) if name in named}
        self._marked = {n for n, text in used.items() if re.search(r"{%[-+]?\s*generation\s*[-+]?%}", text)}
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        sandbox.globals["raise_exception"] = self._refuse
        sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        sandbox.filters["tojson"] = _to_json
        try:
            self._templates = {name: sandbox.from_string(text) for name, text in used.items()}
        except (TemplateError, RecursionError) as error:
            raise UserError(f"{place}: is no Jinja ({error}); mend it, or use the default template") from None

    def encode(self, messages: Sequence[Message]) -> list[Segment]:
        text, spans = self._written(messages)
        ids, places = self._tokenizer.encode_with_places(text)
        learned = [any(start < to and end > at for at, to in spans) for start, end in places]
        found = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
        return [Segment(tuple(token for token, _ in run), said) for said, run in found]

    def ends(self) -> frozenset[int]:
        found = set()
        for name in self._templates:
            talk = Conversation([Message("user", "A"), Message("assistant", "B")])
            talk.tools = [] if name == _TOOL_USE else None
            try:
                turn = self._end_of_turn(talk, 1)
            except UserError:  # it wants more than a question and an answer
                continue
            ids, _ = self._tokenizer.encode_with_places(turn)
            found.update([token for token in ids if token in self._tokenizer.whole][:1])
        return frozenset(found)

    def _written(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and where the assistant speaks in it."""
        answer = messages[-1].role != "assistant"
        text = self._render(messages, answer)
        if self._name(messages) in self._marked:
            return _without_marks(text)
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message.role == "assistant":
                start, end = self._turn(messages, number, text, answer)
                spans.append((max(start, spans[-1][1] if spans else 0), end))
        return text, spans

    def _turn(self, messages: Sequence[Message], number: int, text: str, answer: bool) -> Span:
        """Where one turn of the assistant's stands in the text of all: from where it is left to begin, in a prompt that
        ends before it, up to what the template writes at the end of a turn."""
        asked, said = self._render(_with(messages, messages[:number]), answer=True), text
        if number < len(messages) - 1:
            said = self._render(_with(messages, messages[: number + 1]), answer=False)
        if text.startswith(asked) and text.startswith(said) and len(asked) < len(said):
            return len(asked), len(said)
        # What changes with the words is where they stand; a template may write the same turn otherwise once more
        # follows, such as without the thoughts before an answer.
        start, end = _difference(text, self._render(_said_otherwise(messages, number), answer))
        if text.startswith(asked) and len(asked) <= start:
            start = len(asked)
        closing = self._end_of_turn(_with(messages, messages[: number + 1]), number)
        end += _common(text[end:], closing)
        if end <= start:
            raise UserError(
                f"{self._place}: leaves out what the assistant says in message {number + 1}, or writes it so that it "
                "cannot be told apart; use the default template"
            )
        return start, end

    def _end_of_turn(self, messages: Sequence[Message], number: int) -> str:
        """What the template writes after the assistant's words, where they are the last."""
        text = self._render(messages, answer=False)
        if self._name(messages) in self._marked:
            text, spans = _without_marks(text)
            said = text[slice(*spans[-1])] if spans else ""
            return said[_common(said, messages[number].text) :]
        _, end = _difference(text, self._render(_said_otherwise(messages, number), answer=False))
        return text[end:]

    def _name(self, messages: Sequence[Message]) -> str:
        """Which of several templates writes a conversation down."""
        return _TOOL_USE if _tools(messages) is not None and _TOOL_USE in self._templates else _DEFAULT

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        said, tools = [message.content() for message in messages], _tools(messages)
        template = self._templates.get(self._name(messages))
        if template is None:
            raise UserError(
                f"{self._place}: brings chat templates ({', '.join(sorted(self.jinja))}), none of which is called "
                "default; call one so, or use template default"
            )
        try:
            return template.render(
                messages=said, tools=tools, documents=None, add_generation_prompt=answer, **self._tokenizer.special
            )
        except Exception as error:  # a template is a program of somebody else's: it may raise anything
            what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self._place}: {in_one_line(what)}; use other conversations or the default template"
            ) from None

    def _refuse(self, reason: str) -> None:
        raise TemplateError(reason)


class DefaultTemplate(JinjaTemplate):
    """`[|User|]words</s>[|Assistant|]words</s>`, as the original writes it, for any tokenizer with an end of text.

    Raises:
        UserError: the tokenizer has none.
    """

    JINJA = jinja = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ '[|' + message['role'] | capitalize + '|]' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[|Assistant|]' }}{% endif %}"
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos is None:
            raise UserError("the default chat template needs a tokenizer with an end of text; train or choose another")
        super().__init__(self.JINJA, tokenizer, "the default chat template")


class _Generation(Extension):
    """transformers' `{% generation %}`: what the assistant writes."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_FROM}{caller()}{_TO}"


def _without_marks(text: str) -> tuple[str, list[Span]]:
    """A text without the marks of `_Generation`, and where they were."""
    found, spans = "", []
    for number, part in enumerate(text.split(_FROM)):
        said, mark, rest = part.partition(_TO)
        if number and mark:
            spans.append((len(found), len(found) + len(said)))
        found += said + rest
    return found, spans


def _tools(messages: Sequence[Message]) -> list[Any] | None:
    """The tools that a conversation names; an empty list names some, to transformers."""
    return getattr(messages, "tools", None)


def _with(messages: Sequence[Message], others: Iterable[Message]) -> Conversation:
    """Other turns, with the conversation's tools."""
    found = Conversation(others)
    found.tools = _tools(messages)
    return found


def _said_otherwise(messages: Sequence[Message], number: int) -> Conversation:
    """The conversation with one message in other words."""
    other = Message(messages[number].role, _SOMETHING, messages[number].fields)
    return _with(messages, (*messages[:number], other, *messages[number + 1 :]))


def _difference(text: str, other: str) -> Span:
    """The characters of a text that are not those of another, whose beginning and end are the same."""
    start = _common(text, other)
    most = min(len(text), len(other)) - start
    end = min(_common(text[::-1], other[::-1]), most)
    return start, len(text) - end


def _common(text: str, other: str) -> int:
    """Characters at the beginning of both."""
    known, most = 0, min(len(text), len(other))
    while known < most:
        middle = (known + most + 1) // 2
        if text[known:middle] == other[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def open_template(name: str, tokenizer: Tokenizer, path: str) -> Template:
    """The template that a configuration names.

    Args:
        name: `tokenizer` for the one that came with the tokenizer, or `default`.
        tokenizer: opened from `path`.
        path: data.tokenizer.

    Raises:
        UserError: the tokenizer brings none, or one that cannot be used.
    """
    if name == "default":
        return DefaultTemplate(tokenizer)
    found = _brought(Path(path))
    if found is None:
        raise UserError(f"{name}: {path} brings no chat template; template default would do, or another tokenizer")
    return JinjaTemplate(found[0], tokenizer, str(found[1]))


def stop_tokens(
    tokenizer: Tokenizer, jinja: Jinja | None, vocab: int, others: frozenset[int] = frozenset()
) -> tuple[frozenset[int], str | None]:
    """Every id that ends a text of a model, and a line about those that are left out because it has no such token.

    Args:
        tokenizer: its end of text, and those of generation_config.json beside it, end a text.
        jinja: the template that the model was finetuned with, or None; it ends where a turn of the assistant's does.
        vocab: the model's rows.
        others: of another template.
    """
    found = tokenizer.stops | others
    if jinja is not None:
        found |= JinjaTemplate(jinja, tokenizer, "the checkpoint's chat template").ends()
    none = sorted(token for token in found if not 0 <= token < vocab)
    words = (
        f"eos_token_id {', '.join(map(str, none))}: no such token in the model's vocab of {vocab}, so it ends no text"
    )
    return found.difference(none), words if none else None


def _brought(folder: Path) -> tuple[Jinja, Path] | None:
    """The templates of a tokenizer folder, and where they are; files of theirs count before tokenizer_config.json."""
    file, words = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    found = {_DEFAULT: file} if file.is_file() else {}
    found |= {one.name.removesuffix(".jinja"): one for one in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if found:
        texts = {name: one.read_text(encoding="utf-8") for name, one in found.items()}
        return _alone(texts), file if file.is_file() else folder / TEMPLATES
    source = json.loads(words.read_text(encoding="utf-8-sig")).get("chat_template") if words.is_file() else None
    if isinstance(source, list):  # several, by name
        source = {name: text for name, text in (_named(one, words) for one in source)}
        return (_alone(source), words) if source else None
    if source is not None and not isinstance(source, str):
        raise UserError(f"{words}: chat_template is neither text nor a list of templates; save the tokenizer again")
    return (source, words) if source else None


def _alone(templates: dict[str, str]) -> Jinja:
    return templates[_DEFAULT] if templates.keys() == {_DEFAULT} else templates


def _named(one: Any, place: Path) -> tuple[str, str]:
    name, text = (one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None)
    # The name becomes that of a file.
    if not isinstance(name, str) or not isinstance(text, str) or Path(name).name != name:
        raise UserError(
            f"{place}: chat_template holds {in_one_line(json.dumps(one))[:60]}, which is no name with a template; "
            "save the tokenizer again"
        )
    return name, text
