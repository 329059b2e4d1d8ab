"""Conversations and messages, and their form for chat templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning text; if several are present, the first is used, as in transformers."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    """One of `ROLES`, or another tool role that a template knows, such as ipython."""
    words: str | tuple[Any, ...] | None
    """Content: a text, text parts, or None if there is none, as beside tool_calls."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Other fields that a template may read, such as tool_calls."""
    in_loss: bool = True
    """Whether the loss counts it, if it is an assistant message."""

    @property
    def text(self) -> str:
        """Content as one string."""
        if isinstance(self.words, tuple):
            return "".join(part if isinstance(part, str) else part["text"] for part in self.words)
        return self.words or ""

    def content(self) -> dict[str, Any]:
        """The message as transformers passes it to a template: without keys whose value is None, and with the reasoning
        text under both `thinking` and `reasoning_content`."""
        words = list(self.words) if isinstance(self.words, tuple) else self.words
        found = {"role": self.role, "content": words, **self.fields}
        found = {key: value for key, value in found.items() if value is not None}
        thoughts = next((found[key] for key in THOUGHTS if key in found), None)
        return found if thoughts is None else {"thinking": thoughts, **found, "reasoning_content": thoughts}

    def otherwise(self, word: str, calls: bool) -> Message:
        """A copy with content and reasoning replaced by `word`, or, with `calls`, with changed tool-call arguments."""
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
    """Messages and tools of one conversation."""

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    """Descriptions of the tools that the assistant may call; None if the conversation has no tools key."""
    place: str | None = field(default=None, compare=False)
    """FILE:LINE, for messages."""

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def upto(self, count: int) -> Conversation:
        """The conversation truncated to its first `count` messages."""
        return replace(self, messages=self.messages[:count])

    def exchanged(self, number: int, message: Message) -> Conversation:
        """The conversation with message `number` replaced."""
        return replace(self, messages=(*self.messages[:number], message, *self.messages[number + 1 :]))

    def plain(self) -> Conversation:
        """The conversation with every content as one string."""
        return replace(self, messages=tuple(replace(message, words=message.text) for message in self.messages))


def _called_otherwise(call: Any, word: str) -> Any:
    """A tool call with changed arguments, or, without any, a changed name; its id stays, as tool messages repeat it."""
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
