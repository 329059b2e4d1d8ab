"""Conversations from jsonl files, and the templates that turn them into text: which of it the assistant says."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_capgap.config.errors import UserError
from megatron_capgap.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """system, user or assistant."""
    text: str


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a conversation."""

    tokens: tuple[int, ...]
    learned: bool
    """Whether the loss counts them: the assistant says them."""


Conversation = tuple[Message, ...]


def read_conversations(path: str) -> list[Conversation]:
    """Every conversation of a jsonl file: a line is `{"messages": [{"role": ..., "content": ...}, ...]}`, or, as in the
    original's files, `[{"User": ..., "Assistant": ...}, ...]`.

    Raises:
        UserError: the file is missing or empty, or a line is no conversation; with its number.
    """
    found = []
    with open(conversations_file(path), encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found.append(_conversation(f"{path}:{number}", line))
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


def _conversation(place: str, line: str) -> Conversation:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); mend or remove the line") from None
    messages = read_turns(place, content)
    if not messages or messages[-1].role != "assistant":
        raise UserError(f"{place}: does not end with an assistant message; add it or remove the line")
    return messages


def read_turns(place: str, content: Any) -> Conversation:
    """The messages of a line that was read from JSON; the user and the assistant take turns, whoever is last.

    Args:
        place: what messages call it.
        content: as in `read_conversations`.

    Raises:
        UserError: it is no conversation.
    """
    messages = tuple(_messages(place, content))
    first = 1 if messages and messages[0].role == "system" else 0
    for position, message in enumerate(messages[first:]):
        wanted = ("user", "assistant")[position % 2]
        if message.role != wanted:
            turn = first + position + 1
            raise UserError(
                f"{place}: message {turn} is the {message.role}'s, the {wanted}'s is due; turns alternate, a system "
                "message may only come first"
            )
    return messages


def _messages(place: str, content: Any) -> Iterator[Message]:
    if isinstance(content, list):  # the original's
        for turn, pair in enumerate(content, start=1):
            for role, name in (("user", "User"), ("assistant", "Assistant")):
                if not isinstance(pair, dict) or name not in pair:
                    raise UserError(f"{place}: turn {turn} has no {name}; each holds User and Assistant")
                yield _message(place, f"turn {turn}", role, pair[name])
        return
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise UserError(f'{place}: neither {{"messages": [...]}} nor a list of User and Assistant turns; mend the line')
    for turn, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            shown = "is missing" if role is None else f"{role!r} is unknown"
            raise UserError(f"{place}: message {turn}: its role {shown}; one of {', '.join(ROLES)} would do")
        yield _message(place, f"message {turn}", role, message.get("content"))


def _message(place: str, what: str, role: str, text: Any) -> Message:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: {what}: the {role} says nothing; remove the line, or give it words")
    return Message(role, text)


class Template(ABC):
    """How a conversation is written down for a tokenizer.

    Attributes:
        jinja: the same in the language of Hugging Face's tokenizers.
    """

    jinja: str

    @abstractmethod
    def encode(self, messages: Sequence[Message]) -> list[Segment]:
        """Tokens from the beginning on; after a last message of the user's, up to where the assistant begins."""


class DefaultTemplate(Template):
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
        self._encode, self._end = tokenizer.encode, tokenizer.eos
        self._begin = () if tokenizer.bos is None else (tokenizer.bos,)

    def encode(self, messages: Sequence[Message]) -> list[Segment]:
        found, asked = [], [*self._begin]
        answers = messages[-1].role == "assistant"
        for message in messages:
            if message.role == "assistant":
                asked += self._encode("[|Assistant|]")
                found.append(Segment(tuple(asked), False))
                found.append(Segment((*self._encode(message.text), self._end), True))
                asked = []
            else:
                asked += self._encode(("[|User|]" if message.role == "user" else "") + message.text)
                asked.append(self._end)
        return found if answers else [*found, Segment((*asked, *self._encode("[|Assistant|]")), False)]


class JinjaTemplate(Template):
    """A tokenizer's own `chat_template`, in the sandbox and with the helpers that transformers gives it.

    Args:
        source: the template.
        tokenizer: with tokenizer.json, for special tokens stand in the text.
        special: bos_token, eos_token and the like as text.
        place: what messages call it.

    Raises:
        UserError: it is no Jinja.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, special: dict[str, str], place: str) -> None:
        self.jinja = source
        self._tokenizer, self._special, self._place = tokenizer, special, place
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.globals["raise_exception"] = self._refuse
        sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self._template = sandbox.from_string(source)
        except TemplateError as error:
            raise UserError(f"{place}: is no Jinja ({error}); mend it, or use the default template") from None

    def encode(self, messages: Sequence[Message]) -> list[Segment]:
        found, done = [], ""
        for number, message in enumerate(messages):
            last = number == len(messages) - 1
            if message.role == "assistant":
                asked = self._render(messages[:number], answer=True)
                said = self._render(messages[: number + 1], answer=False)
                for text, learned in ((asked, False), (said, True)):
                    found.append(self._segment(text, done, learned))
                    done = text
            elif last:
                found.append(self._segment(self._render(messages, answer=True), done, learned=False))
        return found

    def _segment(self, text: str, done: str, learned: bool) -> Segment:
        """What `text` adds to `done`."""
        if not text.startswith(done):
            raise UserError(
                f"{self._place}: writes the beginning of a conversation otherwise once more follows, so that the "
                "assistant's words cannot be told apart; use the default template"
            )
        return Segment(tuple(self._tokenizer.encode(text[len(done) :])), learned)

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        said = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return self._template.render(messages=said, add_generation_prompt=answer, **self._special)
        except TemplateError as error:
            raise UserError(f"{self._place}: {error}; use other conversations or the default template") from None

    def _refuse(self, reason: str) -> None:
        raise TemplateError(reason)


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
    folder = Path(path)
    words = folder / "tokenizer_config.json"
    config = json.loads(words.read_text(encoding="utf-8")) if words.is_file() else {}
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    if not source:
        raise UserError(f"{name}: {path} brings no chat template; template default would do, or another tokenizer")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{path}: its chat template needs a tokenizer.json; save the tokenizer with it")
    special = {key: _content(value) for key, value in config.items() if key.endswith("_token") and _content(value)}
    return JinjaTemplate(source, tokenizer, special, str(file if file.is_file() else words))


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None
