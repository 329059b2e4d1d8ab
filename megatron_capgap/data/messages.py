"""Conversations: messages and what a template reads of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""What a message's thoughts are called; of several, transformers takes the first."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """One of `ROLES`, or what else a template may call a tool, such as ipython."""
    words: str | tuple[Any, ...] | None
    """Its content: text, parts of text, or None where it has none, as beside tool_calls."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else a template may read, such as tool_calls."""
    learned: bool = True
    """Whether the loss counts it where it is the assistant's."""

    @property
    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.words, tuple):
            return "".join(part if isinstance(part, str) else part["text"] for part in self.words)
        return self.words or ""

    def content(self) -> dict[str, Any]:
        """As transformers hands it to a template: without keys that hold nothing, and with the thoughts under the names
        that templates read."""
        words = list(self.words) if isinstance(self.words, tuple) else self.words
        found = {"role": self.role, "content": words, **self.fields}
        found = {key: value for key, value in found.items() if value is not None}
        thoughts = next((found[key] for key in THOUGHTS if key in found), None)
        return found if thoughts is None else {"thinking": thoughts, **found, "reasoning_content": thoughts}

    def otherwise(self, word: str, calls: bool) -> Message:
        """The message in other words and with other thoughts, or with other arguments of its tool calls."""
        fields = dict(self.fields)
        if calls:
            fields["tool_calls"] = [_called_otherwise(call, word) for call in fields.get("tool_calls") or ()]
            return replace(self, fields=fields)
        fields |= {key: word for key in THOUGHTS if isinstance(fields.get(key), str)}
        words: str | tuple[Any, ...] = word
        if isinstance(self.words, tuple):
            words = tuple(word if isinstance(part, str) else {**part, "text": word} for part in self.words)
        return replace(self, words=words, fields=fields)


@dataclass(frozen=True)
class Conversation:
    """The turns of one conversation, and the tools that it names."""

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    """Descriptions of the tools that the assistant may call; None where the conversation does not speak of tools."""
    place: str | None = field(default=None, compare=False)
    """What messages call it."""

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def upto(self, count: int) -> Conversation:
        """Its first messages."""
        return replace(self, messages=self.messages[:count])

    def exchanged(self, number: int, message: Message) -> Conversation:
        """The conversation with another message in one place."""
        return replace(self, messages=(*self.messages[:number], message, *self.messages[number + 1 :]))

    def plain(self) -> Conversation:
        """Every content as one text."""
        return replace(self, messages=tuple(replace(message, words=message.text) for message in self.messages))


def _called_otherwise(call: Any, word: str) -> Any:
    """A tool call with other arguments, or, without any, of another function; its id is left, since tools repeat it."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _called_otherwise(call["function"], word)}
    key = "arguments" if call.get("arguments") else "name"
    return {**call, key: _otherwise(call.get(key), word)}


def _otherwise(value: Any, word: str) -> Any:
    if isinstance(value, dict):
        return {key: _otherwise(one, word) for key, one in value.items()}
    return [_otherwise(one, word) for one in value] if isinstance(value, list) else word
