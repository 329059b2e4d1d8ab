"""Templates that turn a conversation into text and ids, and tell what of it the assistant says."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.data import template_files
from megatron_capgap.data.jinja import Rendering, Span, TemplateSource
from megatron_capgap.data.messages import ROLES, Conversation, Message
from megatron_capgap.data.template_files import DEFAULT, TOOL_USE, Jinja
from megatron_capgap.data.tokenizer import Tokenizer

_CALL = {"id": "aaaaaaaaa", "type": "function", "function": {"name": "f", "arguments": {"a": "B"}}}
_SOMETHING = "\ue0f2"  # a private character, which no text holds: stands for a message


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a conversation."""

    tokens: tuple[int, ...]
    learned: bool
    """Whether the loss counts them: the assistant says them."""
    joined: bool = False
    """Whether the tokenizer has merged the assistant's first characters with what stands before them; a prompt that
    ends there has other ids."""


class Template(ABC):
    """How a conversation is written down for a tokenizer.

    Attributes:
        jinja: the same in the language of Hugging Face's tokenizers.
    """

    jinja: Jinja

    @abstractmethod
    def encode(self, conversation: Conversation) -> list[Segment]:
        """Tokens from the beginning on; after a last message of the user's, up to where the assistant begins."""

    @abstractmethod
    def ends(self) -> frozenset[int]:
        """Ids that the template writes where the assistant's turn ends; a text that is generated ends there too."""


class JinjaTemplate(Template):
    """A template in Jinja, in the sandbox and with the helpers that transformers gives it.

    The whole conversation becomes text and then ids, as in transformers' `apply_chat_template`: what a tokenizer makes
    of a piece depends on what stands before it. The assistant's words are what `{% generation %}` marks, or, without
    such marks, from where the template leaves the assistant to begin to the end of its turn. A token that stands for
    characters on both sides of that beginning is learned, and told of (`Segment.joined`): generation begins behind a
    prompt that ends there, whose ids are others.

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
        named = {DEFAULT: source} if isinstance(source, str) else source
        try:
            self._sources = {name: TemplateSource(named[name]) for name in (DEFAULT, TOOL_USE) if name in named}
        except (TemplateError, RecursionError) as error:
            raise UserError(f"{place}: is no Jinja ({error}); mend it, or use the default template") from None

    def encode(self, conversation: Conversation) -> list[Segment]:
        conversation = self._readable(self._tools_by_name(conversation))
        text, spans = self._written(conversation)
        ids, places = self._tokenizer.encode_with_places(text)
        if self._source(conversation).marked:
            learned = [any(start < to and end > at for at, to in spans) for start, end in places]
        else:
            learned = [any(_within(text, start, end, *span) for span in spans) for start, end in places]
        joined = {self._joined(text, at, ids, places) for at, _ in spans}
        found = []
        for said, run in groupby(range(len(ids)), key=lambda number: learned[number]):
            numbers = list(run)
            found.append(Segment(tuple(ids[n] for n in numbers), said, said and not joined.isdisjoint(numbers)))
        return found

    def _joined(self, text: str, at: int, ids: list[int], places: list[Span]) -> int | None:
        """The first of the assistant's tokens, by its number, where the prompt before it alone has other ids."""
        if any(start == at for start, _ in places) and (not at or any(end == at for _, end in places)):
            return None
        # Not where a token ends; or one whose space counts for nothing in its place, so that only the ids tell.
        asked, _ = self._tokenizer.encode_with_places(text[:at])
        if ids[: len(asked)] == asked:
            return None
        return next((number for number, (_, end) in enumerate(places) if end > at), None)

    def ends(self) -> frozenset[int]:
        found = set()
        for name in self._sources:
            for asked, said in (("A", "B"), (_parts("A"), _parts("B"))):
                found.update(self._tokens_at_the_end(name, asked, Message("assistant", said))[:1])
        for name in self._sources:
            # Some templates end a turn that calls a tool otherwise; what stands before the end belongs to the call.
            closing = self._tokens_at_the_end(name, "A", Message("assistant", None, {"tool_calls": [_CALL]}))
            if found.isdisjoint(closing):
                found.update(closing[-1:])
        return frozenset(found)

    def _tokens_at_the_end(self, name: str, asked: Any, said: Message) -> list[int]:
        """Ids of the tokens, among those that are never cut, which a template writes behind the assistant's words."""
        try:
            talk = Conversation((Message("user", asked), said), [] if name == TOOL_USE else None)
            turn = self._end_of_turn(talk, 1)
        except UserError:  # it wants more than a question and an answer
            return []
        ids, _ = self._tokenizer.encode_with_places(turn)
        return [token for token in ids if token in self._tokenizer.whole]

    def _tools_by_name(self, conversation: Conversation) -> Conversation:
        """The conversation with tools called `tool` where the template leaves out, or fails at, what they are called
        otherwise."""
        numbers = [number for number, message in enumerate(conversation) if message.role not in ROLES]
        answer = conversation.messages[-1].role != "assistant"
        text = self._part(conversation, answer) if numbers else None
        if text is not None and all(self._changed(conversation, n, answer, calls=False) != text for n in numbers):
            return conversation
        for number in numbers:
            conversation = conversation.exchanged(number, replace(conversation.messages[number], role="tool"))
        return conversation

    def _readable(self, conversation: Conversation) -> Conversation:
        """The conversation as the template can read it: where it fails at content in parts, or at none, each content
        becomes one text. There transformers fails too.

        Raises:
            UserError: it prints parts as a list, or leaves them out.
        """
        if all(isinstance(message.words, str) for message in conversation):
            return conversation
        answer = conversation.messages[-1].role != "assistant"
        try:
            text = self._render(conversation, answer).text
        except UserError:
            return conversation.plain()
        for number, message in enumerate(conversation):
            if isinstance(message.words, tuple):
                printed = str(list(message.words)) in text
                if printed or self._changed(conversation, number, answer, calls=False) == text:
                    raise UserError(
                        f"{self._place}: {'prints as a list' if printed else 'leaves out'} the content of message "
                        f"{number + 1}, which is in parts, and transformers would do the same; write it as one string"
                    )
        return conversation

    def _written(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text, and where the assistant says in it what is to be learned."""
        messages, marked = conversation.messages, self._source(conversation).marked
        answer = messages[-1].role != "assistant"
        text, said = self._render(conversation, answer)
        spoken = [number for number, message in enumerate(messages) if message.role == "assistant"]
        wanted = [number for number in spoken if messages[number].learned != marked]
        spans: list[Span] = []
        for number in spoken if marked else ():
            if messages[number].learned:
                self._check_said(conversation, number, text, answer)
        for number in wanted:
            start, end = self._turn(conversation, number, text, answer)
            spans.append((max(start, spans[-1][1] if spans else 0), end))
        if not marked:
            return text, spans
        return text, [(at, to) for at, to in said if not any(at < end and to > start for start, end in spans)]

    def _turn(self, conversation: Conversation, number: int, text: str, answer: bool) -> Span:
        """Where one turn of the assistant's stands in the text of all: from where it is left to begin, in a prompt that
        ends before it, up to what the template writes at the end of a turn."""
        before, after = conversation.upto(number), conversation.upto(number + 1)
        asked = self._part(before, answer=True)
        said = self._part(after, answer=False) if len(after) < len(conversation) else text
        self._check_said(conversation, number, text, answer)
        if asked is not None and said is not None and len(asked) < len(said):
            if text.startswith(asked) and text.startswith(said):
                return len(asked), len(said)
        # What changes with the words is where they stand; a template may write the same turn otherwise once more
        # follows, such as without the thoughts before an answer.
        start, end = self._words(conversation, number, text, answer) or (len(text), len(text))
        turns = self._turns(conversation, answer, text)
        if asked is None:  # such as where the assistant speaks first; a header is the same behind any question
            before = Conversation((Message("user", "A"),), conversation.tools)
            asked = self._part(before, answer=True) or ""
        start = self._begins(before, asked, text, start, turns)
        if said is None:  # such as where the user has not spoken yet
            after = Conversation((Message("user", "A"), conversation.messages[number]), conversation.tools)
        closing = self._end_of_turn(after, len(after) - 1)
        shared = _common(text[end:], closing)
        if shared == len(closing):
            return start, end + shared
        # A template may end the last turn otherwise than those before.
        follows = self._words(conversation, number + 1, text, answer) if number + 1 < len(conversation) else None
        limit = len(text) if follows is None else follows[0]
        ends = [place for place in turns if end <= place <= limit]
        return start, ends[0] if ends else end + self._whole(text[end : end + shared])

    def _check_said(self, conversation: Conversation, number: int, text: str, answer: bool) -> None:
        """Refuses a template that writes nothing of what the assistant says and calls; some leave out words beside
        tool calls, and thoughts before an earlier answer."""
        message = conversation.messages[number]
        words, calls = bool(message.text.strip()), bool(message.fields.get("tool_calls"))
        tried = [kind for kind, there in ((False, words), (True, calls)) if there]
        if tried and all(self._changed(conversation, number, answer, kind) == text for kind in tried):
            raise UserError(
                f"{self._place}: leaves out what the assistant {'says' if words else 'calls'} in message {number + 1}, "
                "or writes it so that it cannot be told apart; use the default template"
            )

    def _part(self, conversation: Conversation, answer: bool) -> str | None:
        """The text of the beginning of a conversation, or None where the template fails at it."""
        try:
            return self._render(conversation, answer).text
        except UserError:
            return None

    def _begins(self, before: Conversation, asked: str, text: str, start: int, turns: list[int]) -> int:
        """Where the turn begins whose words begin at `start`."""
        if asked and text.startswith(asked) and len(asked) <= start:
            return len(asked)
        here = max((place for place in turns if place <= start), default=start)
        header = asked[max(self._turns(before, True, asked), default=len(asked)) :]
        there = here + len(header)
        return there if there <= start and text.startswith(header, here) else start

    def _whole(self, text: str) -> int:
        """Characters of a text up to the last token that is never cut, or the last space: what begins alike behind
        that may be the half of something else."""
        ids, places = self._tokenizer.encode_with_places(text)
        marks = [to for token, (_, to) in zip(ids, places, strict=True) if token in self._tokenizer.whole]
        return max([*marks, *(space.end() for space in re.finditer(r"\s+", text))], default=0)

    def _words(self, conversation: Conversation, number: int, text: str, answer: bool) -> Span | None:
        """What of the text changes with the words of a message, or with its tool calls."""
        for calls in (False, True) if conversation.messages[number].fields.get("tool_calls") else (False,):
            changed = self._changed(conversation, number, answer, calls)
            if changed != text:
                return _difference(text, changed)
        return None

    def _changed(self, conversation: Conversation, number: int, answer: bool, calls: bool) -> str:
        """The text, had a message other words or other tool calls."""
        other = conversation.messages[number].otherwise(_SOMETHING, calls)
        return self._render(conversation.exchanged(number, other), answer).text

    def _turns(self, conversation: Conversation, answer: bool, text: str) -> list[int]:
        return self._source(conversation).turns(self._values(conversation, answer), text)

    def _end_of_turn(self, conversation: Conversation, number: int) -> str:
        """What the template writes after the assistant's words, where they are the last; nothing where it fails at
        a conversation that ends there."""
        if self._part(conversation, answer=False) is None:
            return ""
        text, said = self._render(conversation, answer=False)
        words = self._words(conversation, number, text, answer=False)
        if self._source(conversation).marked:  # the mark may hold the header of the turn too
            return text[words[1] : said[-1][1]] if words and said else ""
        return text[words[1] :] if words else ""

    def _source(self, conversation: Conversation) -> TemplateSource:
        """Which of several templates writes a conversation down; an empty list of tools names some, to transformers."""
        name = TOOL_USE if conversation.tools is not None and TOOL_USE in self._sources else DEFAULT
        if name not in self._sources:
            raise UserError(
                f"{self._place}: brings chat templates ({', '.join(sorted(self.jinja))}), none of which is called "
                "default; call one so, or use template default"
            )
        return self._sources[name]

    def _render(self, conversation: Conversation, answer: bool) -> Rendering:
        source = self._source(conversation)
        try:
            return source.render(self._values(conversation, answer))
        except Exception as error:  # a template is a program of somebody else's: it may raise anything
            what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self._place}: {in_one_line(what)}; use other conversations or the default template"
            ) from None

    def _values(self, conversation: Conversation, answer: bool) -> dict[str, Any]:
        """What a template reads."""
        messages = [message.content() for message in conversation]
        told = {"messages": messages, "tools": conversation.tools, "documents": None, "add_generation_prompt": answer}
        return {**self._tokenizer.special, **told}


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


def _parts(text: str) -> tuple[dict[str, str], ...]:
    return ({"type": "text", "text": text},)


def _within(text: str, start: int, end: int, at: int, to: int) -> bool:
    """Whether a token belongs to a turn. One that reaches over its beginning does, as in transformers; one that begins
    with the space behind the words and holds what comes after the turn does not."""
    return start < to and end > at and (end <= to or not text[start:to].isspace())


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
    found = template_files.brought(Path(path))
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
