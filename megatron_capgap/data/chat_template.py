"""Chat templates: render a conversation to text and token ids, and mark the tokens that the assistant writes."""

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
_PLACEHOLDER = "\ue0f2"  # private-use character that no text contains: placeholder for a message


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a conversation."""

    tokens: tuple[int, ...]
    in_loss: bool
    """Whether the loss counts them: the assistant writes them."""
    joined: bool = False
    """Whether a token merges the assistant's first characters with the text before them; a prompt that ends there has
    different ids."""


class Template(ABC):
    """Encodes conversations with one tokenizer.

    Attributes:
        jinja: the template as Jinja source, as Hugging Face tokenizers store it.
    """

    jinja: Jinja

    @abstractmethod
    def encode(self, conversation: Conversation) -> list[Segment]:
        """Tokens of the conversation; if the last message is not the assistant's, includes the generation prompt."""

    @abstractmethod
    def end_of_turn_ids(self) -> frozenset[int]:
        """Ids that the template writes at the end of an assistant turn; generation stops at them."""


class JinjaTemplate(Template):
    """A Jinja template, run in the same sandbox and with the same helpers as in transformers.

    The complete conversation is rendered to text and then encoded, as in transformers' `apply_chat_template`, because
    tokenization of a part depends on the text before it. The assistant's text is what `{% generation %}` marks, or,
    without such marks, from the end of the generation prompt to the end of the turn. A token that spans the start of
    the assistant's text is in the loss and reported (`Segment.joined`): at generation the prompt ends there, and its
    ids differ.

    Args:
        source: the template, or several by name; names other than `default` and `tool_use` are exported only.
        tokenizer: gives bos_token, eos_token and other special tokens as text.
        place: name of the template in messages.

    Raises:
        UserError: `source` is not valid Jinja.
    """

    def __init__(self, source: Jinja, tokenizer: Tokenizer, place: str) -> None:
        self.jinja = source
        self._tokenizer, self._place = tokenizer, place
        named = {DEFAULT: source} if isinstance(source, str) else source
        try:
            self._sources = {name: TemplateSource(named[name]) for name in (DEFAULT, TOOL_USE) if name in named}
        except (TemplateError, RecursionError) as error:
            raise UserError(f"{place}: is not valid Jinja ({error}); fix it, or use the default template") from None

    def encode(self, conversation: Conversation) -> list[Segment]:
        conversation = self._readable(self._tools_by_name(conversation))
        text, spans = self._text_with_loss_spans(conversation)
        ids, places = self._tokenizer.encode_with_places(text)
        if self._source(conversation).marked:
            in_loss = [any(start < to and end > at for at, to in spans) for start, end in places]
        else:
            in_loss = [any(_within(text, start, end, *span) for span in spans) for start, end in places]
        joined = {self._joined(text, at, ids, places) for at, _ in spans}
        found = []
        for counted, run in groupby(range(len(ids)), key=lambda number: in_loss[number]):
            numbers = list(run)
            found.append(Segment(tuple(ids[n] for n in numbers), counted, counted and not joined.isdisjoint(numbers)))
        return found

    def _joined(self, text: str, at: int, ids: list[int], places: list[Span]) -> int | None:
        """Index of the assistant's first token if the prompt encoded alone has different ids; else None."""
        if any(start == at for start, _ in places) and (not at or any(end == at for _, end in places)):
            return None
        # No token boundary here, or a token whose space maps to no characters: compare the ids.
        prompt, _ = self._tokenizer.encode_with_places(text[:at])
        if ids[: len(prompt)] == prompt:
            return None
        return next((number for number, (_, end) in enumerate(places) if end > at), None)

    def end_of_turn_ids(self) -> frozenset[int]:
        found = set()
        for name in self._sources:
            for question, answer in (("A", "B"), (_parts("A"), _parts("B"))):
                found.update(self._tokens_at_the_end(name, question, Message("assistant", answer))[:1])
        for name in self._sources:
            # Some templates end a tool-call turn differently; the tokens before its last one belong to the call.
            closing = self._tokens_at_the_end(name, "A", Message("assistant", None, {"tool_calls": [_CALL]}))
            if found.isdisjoint(closing):
                found.update(closing[-1:])
        return frozenset(found)

    def _tokens_at_the_end(self, name: str, question: Any, answer: Message) -> list[int]:
        """Ids of the never-split tokens that a template writes after the assistant's text."""
        try:
            talk = Conversation((Message("user", question), answer), [] if name == TOOL_USE else None)
            turn = self._end_of_turn(talk, 1)
        except UserError:  # the template needs more than a question and an answer
            return []
        ids, _ = self._tokenizer.encode_with_places(turn)
        return [token for token in ids if token in self._tokenizer.whole]

    def _tools_by_name(self, conversation: Conversation) -> Conversation:
        """Renames tool roles (such as ipython) to `tool` if the template drops, or fails at, their original name."""
        numbers = [number for number, message in enumerate(conversation) if message.role not in ROLES]
        answer = conversation.messages[-1].role != "assistant"
        text = self._part(conversation, answer) if numbers else None
        if text is not None and all(self._changed(conversation, n, answer, calls=False) != text for n in numbers):
            return conversation
        for number in numbers:
            conversation = conversation.exchanged(number, replace(conversation.messages[number], role="tool"))
        return conversation

    def _readable(self, conversation: Conversation) -> Conversation:
        """The conversation in a form that the template accepts: if it fails at content in parts, or at missing content,
        each content becomes one string. transformers fails on these.

        Raises:
            UserError: the template prints parts as a list, or drops them.
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
                        f"{number + 1}, which is in parts, as transformers does; write the content as one string"
                    )
        return conversation

    def _text_with_loss_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered text, and its spans in the loss."""
        messages, marked = conversation.messages, self._source(conversation).marked
        answer = messages[-1].role != "assistant"
        text, marked_spans = self._render(conversation, answer)
        from_assistant = [number for number, message in enumerate(messages) if message.role == "assistant"]
        wanted = [number for number in from_assistant if messages[number].in_loss != marked]
        spans: list[Span] = []
        for number in from_assistant if marked else ():
            if messages[number].in_loss:
                self._check_rendered(conversation, number, text, answer)
        for number in wanted:
            start, end = self._turn(conversation, number, text, answer)
            spans.append((max(start, spans[-1][1] if spans else 0), end))
        if not marked:
            return text, spans
        return text, [(at, to) for at, to in marked_spans if not any(at < end and to > start for start, end in spans)]

    def _turn(self, conversation: Conversation, number: int, text: str, answer: bool) -> Span:
        """Span of one assistant turn in the rendered text: from the end of the generation prompt to the end-of-turn
        text that the template writes."""
        before, after = conversation.upto(number), conversation.upto(number + 1)
        prompt = self._part(before, answer=True)
        through_turn = self._part(after, answer=False) if len(after) < len(conversation) else text
        self._check_rendered(conversation, number, text, answer)
        if prompt is not None and through_turn is not None and len(prompt) < len(through_turn):
            if text.startswith(prompt) and text.startswith(through_turn):
                return len(prompt), len(through_turn)
        # Locate the content by changing it; a template may render a turn differently once more messages follow, for
        # example without the reasoning before an answer.
        start, end = self._words(conversation, number, text, answer) or (len(text), len(text))
        turns = self._turns(conversation, answer, text)
        if prompt is None:  # for example the assistant speaks first; the header is the same after any question
            before = Conversation((Message("user", "A"),), conversation.tools)
            prompt = self._part(before, answer=True) or ""
        start = self._turn_start(before, prompt, text, start, turns)
        if through_turn is None:  # for example no user message so far
            after = Conversation((Message("user", "A"), conversation.messages[number]), conversation.tools)
        closing = self._end_of_turn(after, len(after) - 1)
        shared = _common(text[end:], closing)
        if shared == len(closing):
            return start, end + shared
        # A template may end the last turn differently from earlier ones.
        follows = self._words(conversation, number + 1, text, answer) if number + 1 < len(conversation) else None
        limit = len(text) if follows is None else follows[0]
        ends = [place for place in turns if end <= place <= limit]
        return start, ends[0] if ends else end + self._whole(text[end : end + shared])

    def _check_rendered(self, conversation: Conversation, number: int, text: str, answer: bool) -> None:
        """Rejects a template that renders neither an assistant message's text nor its tool calls. Some templates drop
        text beside tool calls, and the reasoning before an earlier answer; those are accepted."""
        message = conversation.messages[number]
        words, calls = bool(message.text.strip()), bool(message.fields.get("tool_calls"))
        tried = [kind for kind, present in ((False, words), (True, calls)) if present]
        if tried and all(self._changed(conversation, number, answer, kind) == text for kind in tried):
            raise UserError(
                f"{self._place}: leaves out what the assistant {'says' if words else 'calls'} in message {number + 1}, "
                "or renders it so that it cannot be located; use the default template"
            )

    def _part(self, conversation: Conversation, answer: bool) -> str | None:
        """Rendered text of a conversation's first messages, or None if the template fails."""
        try:
            return self._render(conversation, answer).text
        except UserError:
            return None

    def _turn_start(self, before: Conversation, prompt: str, text: str, start: int, turns: list[int]) -> int:
        """Start of the turn whose content starts at `start`."""
        if prompt and text.startswith(prompt) and len(prompt) <= start:
            return len(prompt)
        header_start = max((place for place in turns if place <= start), default=start)
        header = prompt[max(self._turns(before, True, prompt), default=len(prompt)) :]
        header_end = header_start + len(header)
        return header_end if header_end <= start and text.startswith(header, header_start) else start

    def _whole(self, text: str) -> int:
        """Length of the prefix that ends at the last never-split token or the last whitespace; an equal prefix beyond
        that may be part of another word."""
        ids, places = self._tokenizer.encode_with_places(text)
        marks = [to for token, (_, to) in zip(ids, places, strict=True) if token in self._tokenizer.whole]
        return max([*marks, *(space.end() for space in re.finditer(r"\s+", text))], default=0)

    def _words(self, conversation: Conversation, number: int, text: str, answer: bool) -> Span | None:
        """Span of the text that changes with a message's content, or with its tool calls."""
        for calls in (False, True) if conversation.messages[number].fields.get("tool_calls") else (False,):
            changed = self._changed(conversation, number, answer, calls)
            if changed != text:
                return _difference(text, changed)
        return None

    def _changed(self, conversation: Conversation, number: int, answer: bool, calls: bool) -> str:
        """The rendered text with other content, or other tool calls, in one message."""
        other = conversation.messages[number].otherwise(_PLACEHOLDER, calls)
        return self._render(conversation.exchanged(number, other), answer).text

    def _turns(self, conversation: Conversation, answer: bool, text: str) -> list[int]:
        return self._source(conversation).turns(self._values(conversation, answer), text)

    def _end_of_turn(self, conversation: Conversation, number: int) -> str:
        """Text that the template writes after the assistant's content in the last message; empty if the template fails
        at a conversation that ends there."""
        if self._part(conversation, answer=False) is None:
            return ""
        text, marked_spans = self._render(conversation, answer=False)
        words = self._words(conversation, number, text, answer=False)
        if self._source(conversation).marked:  # the mark may include the header of the turn
            return text[words[1] : marked_spans[-1][1]] if words and marked_spans else ""
        return text[words[1] :] if words else ""

    def _source(self, conversation: Conversation) -> TemplateSource:
        """The template for a conversation; as in transformers, an empty list of tools selects `tool_use`."""
        name = TOOL_USE if conversation.tools is not None and TOOL_USE in self._sources else DEFAULT
        if name not in self._sources:
            raise UserError(
                f"{self._place}: has chat templates ({', '.join(sorted(self.jinja))}), none of which is named "
                "default; rename one to default, or use template default"
            )
        return self._sources[name]

    def _render(self, conversation: Conversation, answer: bool) -> Rendering:
        source = self._source(conversation)
        try:
            return source.render(self._values(conversation, answer))
        except Exception as error:  # a template is third-party code: it may raise anything
            what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self._place}: {in_one_line(what)}; use other conversations or the default template"
            ) from None

    def _values(self, conversation: Conversation, answer: bool) -> dict[str, Any]:
        """Variables of a template."""
        messages = [message.content() for message in conversation]
        variables = {
            "messages": messages,
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": answer,
        }
        return {**self._tokenizer.special, **variables}


class DefaultTemplate(JinjaTemplate):
    """`[|User|]text</s>[|Assistant|]text</s>`, for any tokenizer with an end-of-text token: the format of the
    paper's code (GeneZC/MiniMA).

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    JINJA = jinja = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ '[|' + message['role'] | capitalize + '|]' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[|Assistant|]' }}{% endif %}"
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos is None:
            raise UserError(
                "the default chat template needs a tokenizer with an end-of-text token; train or choose another"
            )
        super().__init__(self.JINJA, tokenizer, "the default chat template")


def _parts(text: str) -> tuple[dict[str, str], ...]:
    return ({"type": "text", "text": text},)


def _within(text: str, start: int, end: int, at: int, to: int) -> bool:
    """Whether a token belongs to a turn. A token that spans the start of the turn does, as in transformers; one that
    starts with the space after the content and contains the text after the turn does not."""
    return start < to and end > at and (end <= to or not text[start:to].isspace())


def _difference(text: str, other: str) -> Span:
    """Span of a text that differs from another text with the same prefix and suffix."""
    start = _common(text, other)
    most = min(len(text), len(other)) - start
    end = min(_common(text[::-1], other[::-1]), most)
    return start, len(text) - end


def _common(text: str, other: str) -> int:
    """Length of the common prefix."""
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
        name: `tokenizer` for the tokenizer's own template, or `default`.
        tokenizer: opened from `path`.
        path: value of data.tokenizer.

    Raises:
        UserError: the tokenizer has no template, or an unusable one.
    """
    if name == "default":
        return DefaultTemplate(tokenizer)
    found = template_files.read_chat_templates(Path(path))
    if found is None:
        raise UserError(f"{name}: {path} has no chat template; use template default, or another tokenizer")
    return JinjaTemplate(found[0], tokenizer, str(found[1]))


def stop_tokens(
    tokenizer: Tokenizer, jinja: Jinja | None, vocab: int, others: frozenset[int] = frozenset()
) -> tuple[frozenset[int], str | None]:
    """Stop ids of a model, and a message about ids dropped because the model's vocabulary lacks them.

    Args:
        tokenizer: its end-of-text id, and the ids in generation_config.json beside it, are stop ids.
        jinja: the template that the model was finetuned with, or None; its end-of-turn ids are stop ids.
        vocab: rows of the model's embedding.
        others: stop ids of another template.
    """
    found = tokenizer.stops | others
    if jinja is not None:
        found |= JinjaTemplate(jinja, tokenizer, "the checkpoint's chat template").end_of_turn_ids()
    none = sorted(token for token in found if not 0 <= token < vocab)
    words = (
        f"eos_token_id {', '.join(map(str, none))}: no such token in the model's vocab of {vocab}, so it ends no text"
    )
    return found.difference(none), words if none else None
