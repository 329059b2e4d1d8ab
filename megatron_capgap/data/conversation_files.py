"""Reads conversations from jsonl files in the formats of OpenAI, ShareGPT and the paper's code (GeneZC/MiniMA)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.data.jsonl import find, json_lines
from megatron_capgap.data.messages import ROLES, THOUGHTS, Conversation, Message

# Role names of ShareGPT, of later data sets in its format, and of model-specific message formats.
_SPEAKERS = {name: "user" for name in ("human", "prompter")}
_SPEAKERS |= dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "claude", "ai", "bot", "chatbot", "model"), "assistant")
_SPEAKERS |= dict.fromkeys(("function_call", "tool_call"), "assistant")
_TOOLS = ("ipython", "observation", "function", "function_response", "tool_response", "environment")
_SPEAKERS |= dict.fromkeys(_TOOLS, "tool")
_SPEAKERS |= {role: role for role in ROLES}
_SILENT = ("system", "developer", "tool", *_TOOLS)
"""Roles whose text may be empty."""
_TURNS = {"messages": "role", "conversations": "from"}
"""Key of a line's turns -> default key of a turn's role; a turn may use the other key."""
_AS_MESSAGES = '{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": %s}]}'
_FORMS = {
    ("instruction", "output"): "it is an Alpaca row: write it as "
    + _AS_MESSAGES % ("INSTRUCTION, followed by INPUT if any", "OUTPUT"),
    ("prompt", "completion"): "it is a prompt with its completion: write it as "
    + _AS_MESSAGES % ("PROMPT", "COMPLETION"),
    ("prompt", "response"): "it is a prompt with its response: write it as " + _AS_MESSAGES % ("PROMPT", "RESPONSE"),
    ("question", "answer"): "it is a question with its answer: write it as " + _AS_MESSAGES % ("QUESTION", "ANSWER"),
    ("chosen", "rejected"): 'it is a pair of preferences: write the turns of one as {"messages": [...]}',
    ("text",): "it is plain text, as adapt and distill read it",
}
"""Keys of rows in other formats -> what the row is and the fix."""


def read_conversations(path: str) -> list[Conversation]:
    """Reads every conversation of a jsonl file. A line is `{"messages": [{"role": ..., "content": ...}, ...]}`,
    ShareGPT's `{"conversations": [{"from": ..., "value": ...}, ...]}`, or that of the paper's
    code, `[{"User": ..., "Assistant": ...}, ...]`. An assistant message with `weight` 0, or `train` or `loss` false,
    is context only.

    Raises:
        UserError: the file is missing or empty, or a line is not a conversation; names the line.
    """
    conversations_file(path)
    found = [_conversation(*line) for line in json_lines(path)]
    if not found:
        raise UserError(
            f'{path}: contains no conversation; a line is {{"messages": [{{"role": ..., "content": ...}}]}}'
        )
    return found


def conversations_file(path: str) -> Path:
    """Path of a conversations file.

    Raises:
        UserError: the file is missing.
    """
    return find(path, "a jsonl file of conversations")


def _conversation(place: str, content: Any) -> Conversation:
    found = read_turns(place, content)
    if not found or found.messages[-1].role != "assistant":
        raise UserError(f"{place}: does not end with an assistant message; add it or remove the line")
    if not any(message.in_loss for message in found if message.role == "assistant"):
        raise UserError(
            f"{place}: no assistant message counts in the loss (weight 0, train or loss false); remove the line"
        )
    return found


def read_turns(place: str, content: Any) -> Conversation:
    """Parses the messages of a decoded line; the chat template decides which order of roles is valid.

    Args:
        place: FILE:LINE, for messages.
        content: the decoded line, as in `read_conversations`.

    Raises:
        UserError: `content` is not a conversation.
    """
    tools = _tools(place, content) if isinstance(content, dict) else None
    return Conversation(tuple(_messages(place, content)), tools, place)


def _tools(place: str, content: dict[str, Any]) -> list[Any] | None:
    """The tools beside the turns; in ShareGPT's format they are a JSON string, empty for no tools."""
    if content.get("functions") is not None:
        raise UserError(f"{place}: functions is OpenAI's deprecated format, which templates do not read; use tools")
    found = content.get("tools")
    if isinstance(found, str):
        try:
            found = json.loads(found) if found.strip() else None
        except (ValueError, RecursionError):
            pass
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise UserError(f"{place}: tools is neither a list of objects nor a JSON string of one; fix the line")
    return found


def _messages(place: str, content: Any) -> Iterator[Message]:
    if isinstance(content, list) and content and isinstance(content[0], dict):
        key = next((key for key in _TURNS.values() if key in content[0]), None)
        if key is not None:
            yield from _each(place, content, key)
            return
    if isinstance(content, list):
        yield from _pairs(place, content)
        return
    for key, role_key in _TURNS.items():
        found = content.get(key) if isinstance(content, dict) else None
        if isinstance(found, list):
            system = content.get("system")
            if isinstance(system, str) and system.strip() and not _begins_with_system(found, system):
                yield Message("system", system)
            yield from _each(place, found, role_key)
            return
    raise UserError(
        f'{place}: neither {{"messages": [...]}}, {{"conversations": [...]}} nor a list of User and Assistant turns; '
        f"{other_form(content) or 'fix the line'}"
    )


def _begins_with_system(turns: list[Any], system: str) -> bool:
    """Whether the first turn is the system message."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    return "system" in (first.get("role"), first.get("from")) and system in (first.get("content"), first.get("value"))


def other_form(content: Any) -> str | None:
    """The fix for a row in another known format, or None."""
    if not isinstance(content, dict):
        return None
    for key, found in content.items():
        first = found[0] if isinstance(found, list) and found else None
        if key not in (*_TURNS, *sum(_FORMS, ())) and isinstance(first, dict) and {"role", "from"} & first.keys():
            return f"its turns are under the key {in_one_line(json.dumps(key))[:60]}: rename it to messages"
    return next((what for keys, what in _FORMS.items() if all(key in content for key in keys)), None)


def _each(place: str, turns: list[Any], role_key: str) -> Iterator[Message]:
    for number, turn in enumerate(turns, start=1):
        yield _message(place, f"message {number}", turn, role_key)


def _pairs(place: str, content: list[Any]) -> Iterator[Message]:
    for turn, pair in enumerate(content, start=1):
        for role, name in (("user", "User"), ("assistant", "Assistant")):
            if not isinstance(pair, dict) or name not in pair:
                raise UserError(f"{place}: turn {turn} has no {name}; each turn needs User and Assistant")
            yield Message(role, _words(place, f"turn {turn}", role, pair[name], {}))


def _message(place: str, what: str, message: Any, role_key: str) -> Message:
    if not isinstance(message, dict):
        message = {}
    role_key = next((key for key in _TURNS.values() if key in message), role_key)
    content_key = next((key for key in ("content", "value") if key in message), "content")
    role = _role(place, what, message.get(role_key), role_key)
    fields = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    if "function_call" in fields:
        raise UserError(
            f"{place}: {what}: function_call is OpenAI's deprecated format, which templates do not read; use tool_calls"
        )
    calls = fields.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{place}: {what}: tool_calls is not a list of objects; fix the line")
    if content_key not in message and not calls and not any(key in fields for key in THOUGHTS):
        raise UserError(
            f"{place}: {what}: has no content, but {', '.join(map(str, message)) or 'nothing'}; put its text under "
            "content"
        )
    words = _words(place, what, role, message.get(content_key), fields)
    return Message(role, words, fields, in_loss=role != "assistant" or _in_loss(place, what, fields))


def _role(place: str, what: str, role: Any, key: str) -> str:
    """The role as templates name it. Tool names under `role` are kept: some templates accept only their own name."""
    name = role.casefold() if isinstance(role, str) else None
    if name not in _SPEAKERS:
        shown = "is missing" if role is None else f"{role!r} is unknown"
        raise UserError(f"{place}: {what}: its {key} {shown}; valid values: {', '.join(sorted(_SPEAKERS))}")
    return name if key == "role" and name in _TOOLS else _SPEAKERS[name]


def _in_loss(place: str, what: str, fields: Mapping[str, Any]) -> bool:
    """Whether the loss counts an assistant message."""
    for key, known in (("weight", (0, 1)), ("train", (False, True)), ("loss", (False, True))):
        if fields.get(key, 1) not in known:
            raise UserError(f"{place}: {what}: its {key} is {fields[key]!r}; valid values: {known[0]}, {known[1]}")
    return all(fields.get(key, True) for key in ("weight", "train", "loss"))


def _words(
    place: str, what: str, role: str, content: Any, fields: Mapping[str, Any]
) -> str | tuple[str | dict[str, Any], ...] | None:
    if isinstance(content, list):
        content = tuple(_part(place, what, part) for part in content)
    elif content is not None and not isinstance(content, str):
        raise UserError(
            f"{place}: {what}: the {role}'s content is of type {type(content).__name__}; write it as a string"
        )
    may_be_silent = role in _SILENT and content is not None
    if role == "assistant":
        may_be_silent = bool(fields.get("tool_calls")) or any(fields.get(key) for key in THOUGHTS)
    if not may_be_silent and not Message(role, content).text.strip():
        raise UserError(f"{place}: {what}: the {role}'s text is empty; remove the line, or add text")
    return content


def _part(place: str, what: str, part: Any) -> str | dict[str, Any]:
    """Checks one part of content in parts: it must be text."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise UserError(
            f"{place}: {what}: a part of its content is of type {kind!r}; only text is supported, remove the line"
        )
    return part
