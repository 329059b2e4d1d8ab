"""Prompts for generation: plain text, or a conversation whose next message is the assistant's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.chat_template import Template
from megatron_capgap.data.conversation_files import other_form, read_turns
from megatron_capgap.data.jsonl import find, json_lines
from megatron_capgap.data.messages import Conversation
from megatron_capgap.data.tokenizer import Tokenizer

Prompt = str | Conversation


def read_prompts(path: str) -> list[Prompt]:
    """Reads every prompt of a jsonl file: a line is `{"prompt": text}`, or `{"messages": [...]}` that ends with a user
    or tool message.

    Raises:
        UserError: the file is missing or empty, or a line is not a prompt; names the line.
    """
    find(path, "a jsonl file of prompts")
    found = [_prompt(*line) for line in json_lines(path)]
    if not found:
        raise UserError(f'{path}: contains no prompt; a line is {{"prompt": "..."}} or {{"messages": [...]}}')
    return found


def _prompt(place: str, content: Any) -> Prompt:
    turns = isinstance(content, dict) and any(key in content for key in ("messages", "conversations"))
    if not isinstance(content, dict) or ("prompt" in content) == turns:
        what = other_form(content) or "fix the line"
        raise UserError(f'{place}: neither {{"prompt": ...}} nor {{"messages": [...]}}; {what}')
    if not turns:
        if not isinstance(content["prompt"], str) or not content["prompt"]:
            raise UserError(f"{place}: prompt is {content['prompt']!r}; write a non-empty text")
        return content["prompt"]
    found = read_turns(place, content)
    if not found or found.messages[-1].role in ("system", "developer", "assistant"):
        raise UserError(f"{place}: does not end with a user or tool message for the assistant to answer; add one")
    return found


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, template: Callable[[], Template], begin: bool) -> list[int]:
    """Encodes a prompt.

    Args:
        prompt: text or a conversation.
        tokenizer: the model's tokenizer.
        template: opens the chat template; called for conversations only.
        begin: whether to put bos before plain text; templates write their own.

    Raises:
        UserError: the tokenizer has no bos, or the template cannot be used.
    """
    if not isinstance(prompt, str):
        return [token for segment in template().encode(prompt) for token in segment.tokens]
    if begin and tokenizer.bos is None:
        raise UserError("--bos: the tokenizer has no bos id; omit --bos")
    return [*([tokenizer.bos] if begin and tokenizer.bos is not None else []), *tokenizer.encode(prompt)]
