"""Conversations from jsonl files, in each of the ways in which they are written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_capgap.config.errors import UserError
from megatron_capgap.data.jsonl import rows

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names, and those of the data sets that followed it.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_SPEAKERS |= {"function_call": "assistant", "observation": "tool", "function_response": "tool", "function": "tool"}
_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""What templates read of a message besides its role and content."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """system, developer, user, assistant or tool."""
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else a template may read, such as tool_calls."""

    def content(self) -> dict[str, Any]:
        """As templates read it."""
        return {"role": self.role, "content": self.text, **self.fields}


class Conversation(tuple[Message, ...]):
    """The turns of one conversation."""

    tools: list[Any] | None = None
    """Descriptions of the tools that the assistant may call; None where the conversation does not speak of tools."""


def read_conversations(path: str) -> list[Conversation]:
    """Every conversation of a jsonl file. A line is `{"messages": [{"role": ..., "content": ...}, ...]}`, ShareGPT's
    `{"conversations": [{"from": ..., "value": ...}, ...]}`, or, as in the original's files,
    `[{"User": ..., "Assistant": ...}, ...]`.

    Raises:
        UserError: the file is missing or empty, or a line is no conversation; with its number.
    """
    conversations_file(path)
    found = [_conversation(*row) for row in rows(path)]
    if not found:
        raise UserError(f'{path}: holds no conversation; a line is {{"messages": [{{"role": ..., "content": ...}}]}}')
    return found


def conversations_file(path: str) -> Path:
    """Where the conversations are.

    Raises:
        UserError: the file is missing.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file; give a jsonl file of conversations")
    return file


def _conversation(place: str, content: Any) -> Conversation:
    messages = read_turns(place, content)
    if not messages or messages[-1].role != "assistant":
        raise UserError(f"{place}: does not end with an assistant message; add it or remove the line")
    return messages


def read_turns(place: str, content: Any) -> Conversation:
    """The messages of a line that was read from JSON; the user and the assistant take turns, whoever is last, and what
    tools say stands between two words of the assistant's.

    Args:
        place: what messages call it.
        content: as in `read_conversations`.

    Raises:
        UserError: it is no conversation.
    """
    messages = Conversation(_messages(place, content))
    if isinstance(content, dict) and isinstance(content.get("tools"), list):
        messages.tools = content["tools"]
    first = 1 if messages and messages[0].role in ("system", "developer") else 0
    due = {"user"}
    for turn, message in enumerate(messages[first:], start=first + 1):
        if message.role not in due:
            raise UserError(
                f"{place}: message {turn} is the {message.role}'s, the {' or '.join(sorted(due))}'s is due; turns "
                "alternate, a system message may only come first"
            )
        called = message.role == "tool" or "tool_calls" in message.fields
        due = {"user": {"assistant"}, "assistant": {"user"}, "tool": {"assistant", "tool"}}[message.role]
        if message.role == "assistant" and (called or _answered_by_a_tool(messages, turn)):
            due = {"tool"}
    return messages


def _answered_by_a_tool(messages: Sequence[Message], turn: int) -> bool:
    """Whether the message after this one, counted from 1, is a tool's."""
    return turn < len(messages) and messages[turn].role == "tool"


def _messages(place: str, content: Any) -> Iterator[Message]:
    if isinstance(content, list):
        yield from _pairs(place, content)
        return
    for key, read in (("messages", _message), ("conversations", _spoken)):
        found = content.get(key) if isinstance(content, dict) else None
        if isinstance(found, list):
            said = content.get("system")
            if isinstance(said, str) and said.strip():
                yield Message("system", said)
            for turn, message in enumerate(found, start=1):
                yield read(place, f"message {turn}", message)
            return
    raise UserError(
        f'{place}: neither {{"messages": [...]}}, {{"conversations": [...]}} nor a list of User and Assistant turns; '
        "mend the line"
    )


def _pairs(place: str, content: list[Any]) -> Iterator[Message]:
    for turn, pair in enumerate(content, start=1):
        for role, name in (("user", "User"), ("assistant", "Assistant")):
            if not isinstance(pair, dict) or name not in pair:
                raise UserError(f"{place}: turn {turn} has no {name}; each holds User and Assistant")
            yield Message(role, _text(place, f"turn {turn}", role, pair[name]))


def _role(place: str, what: str, message: Any, key: str, known: Mapping[str, str]) -> str:
    role = message.get(key) if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in known:
        shown = "is missing" if role is None else f"{role!r} is unknown"
        raise UserError(f"{place}: {what}: its {key} {shown}; one of {', '.join(known)} would do")
    return known[role]


def _message(place: str, what: str, message: Any) -> Message:
    role = _role(place, what, message, "role", dict(zip(ROLES, ROLES, strict=True)))
    fields = {key: message[key] for key in _FIELDS if message.get(key) is not None}
    silent = "tool_calls" in fields and not message.get("content")
    return Message(role, "" if silent else _text(place, what, role, message.get("content")), fields)


def _spoken(place: str, what: str, message: Any) -> Message:
    known = {**_SPEAKERS, **dict(zip(ROLES, ROLES, strict=True))}
    role = _role(place, what, message, "from", known)
    return Message(role, _text(place, what, role, message.get("value")))


def _text(place: str, what: str, role: str, content: Any) -> str:
    if isinstance(content, list):
        content = "".join(_part(place, what, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise UserError(
            f"{place}: {what}: the {role}'s content is no text but {type(content).__name__}; write it as a string"
        )
    # A tool may answer with nothing.
    if content is None or (not content.strip() and role != "tool"):
        raise UserError(f"{place}: {what}: the {role} says nothing; remove the line, or give it words")
    return content


def _part(place: str, what: str, part: Any) -> str:
    """The text of one part of a content in parts."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise UserError(
            f"{place}: {what}: a part of its content is of type {kind!r}; only text can be read, remove the line"
        )
    return part["text"]
