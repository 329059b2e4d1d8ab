"""Lines of conversations and prompts in the forms of other programs: read, or refused with what is to be done."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.conversation_files import read_conversations, read_turns
from megatron_capgap.data.messages import Conversation, Message
from megatron_capgap.data.prompts import read_prompts

SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
WANTED = (Message("user", "q"), Message("assistant", "a"))
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def read(content: Any) -> Conversation:
    return read_turns("a.jsonl:1", content)


@pytest.mark.parametrize(
    "content",
    [
        {"messages": SAID},
        {"messages": SHARED},
        {"conversations": SHARED},
        {"conversations": SAID},
        {"messages": [SAID[0], SHARED[1]]},
        SAID,
        SHARED,
        {"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]},
        {"conversations": [{"from": "USER", "value": "q"}, {"from": "Assistant", "value": "a"}]},
        {"messages": None, "conversations": SHARED},
        {"system": "", "conversations": SHARED, "tools": ""},
        [{"User": "q", "Assistant": "a"}],
    ],
    ids=lambda content: json.dumps(content)[:50],
)
def test_forms_that_are_read(content: Any) -> None:
    assert read(content) == Conversation(WANTED)


@pytest.mark.parametrize(
    "names, role",
    [
        (("human", "user", "prompter", "USER"), "user"),
        (("gpt", "chatgpt", "bard", "bing", "claude", "bot", "model", "assistant", "GPT"), "assistant"),
        (("function_call", "tool_call"), "assistant"),
        (("system",), "system"),
        (("tool", "observation", "function", "function_response", "tool_response", "ipython", "environment"), "tool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_who_speaks(names: tuple[str, ...], role: str) -> None:
    for name in names:
        assert read({"conversations": [{"from": name, "value": "a"}]}) == Conversation((Message(role, "a"),)), name
        # What a `role` calls a tool goes to the template as it stands, as in transformers.
        kept = name if role == "tool" else role
        assert read({"messages": [{"role": name, "content": "a"}]}) == Conversation((Message(kept, "a"),)), name


def test_the_order_of_turns_is_the_template_s_matter(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [[SAID[1]], [SAID[0], *SAID], [*SAID, SAID[1]], [SAID[1], *SAID]]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = read_conversations(str(file))
    assert [[message.content() for message in conversation] for conversation in found] == rows
    assert [conversation.place for conversation in found] == [f"{file}:{number}" for number in (1, 2, 3, 4)]


def test_an_empty_system_message_is_one() -> None:
    for first in ({"from": "system", "value": ""}, {"role": "system", "content": ""}):
        assert read({"conversations": [first, *SHARED]}) == Conversation((Message("system", ""), *WANTED))


def test_a_system_message_that_stands_twice_is_one() -> None:
    first = {"role": "system", "content": "s"}
    wanted = (Message("system", "s"), *WANTED)
    assert read({"system": "s", "messages": [first, *SAID]}) == read({"messages": [first, *SAID]})
    assert read({"system": "s", "conversations": SHARED}) == Conversation(wanted)
    both = read({"system": "t", "messages": [first, *SAID]})
    assert both == Conversation((Message("system", "t"), *wanted)), "the template decides"


def test_what_else_a_message_holds_is_handed_on() -> None:
    answer = {**SAID[1], "name": "bob", "weight": 1, "mood": "fine", "refusal": None, "tool_calls": None}
    assert read([SAID[0], answer]).messages[1].content() == {**SAID[1], "name": "bob", "weight": 1, "mood": "fine"}


@pytest.mark.parametrize(
    "tools, wanted",
    [(TOOLS, TOOLS), (json.dumps(TOOLS), TOOLS), ([], []), ("[]", []), ("", None), (" ", None), (None, None)],
)
def test_tools_may_be_json_in_a_string(tools: Any, wanted: Any) -> None:
    assert read({"conversations": SHARED, "tools": tools}) == Conversation(WANTED, wanted)
    assert read({"messages": SAID, "tools": tools}).tools == wanted


def test_weights_and_train() -> None:
    for out in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}, {"loss": False}):
        answers = [{**SAID[1], **out}, SAID[1]]
        found = read([SAID[0], answers[0], SAID[0], answers[1]])
        assert [message.in_loss for message in found] == [True, False, True, True]


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"messages": SAID, "tools": TOOLS[0]}, "tools is neither a list of objects nor a JSON string of one;"),
        ({"messages": SAID, "tools": "look"}, "tools is neither a list of objects nor"),
        ({"messages": SAID, "tools": json.dumps(TOOLS[0])}, "tools is neither a list of objects nor"),
        ({"messages": SAID, "tools": ["look"]}, "tools is neither a list of objects nor"),
        ({"messages": SAID, "functions": TOOLS}, "functions is OpenAI's deprecated format,"),
        (
            {"messages": [SAID[0], {"role": "assistant", "content": None, "function_call": {"name": "look"}}]},
            "message 2: function_call is OpenAI's deprecated format,",
        ),
        ({"messages": [SAID[0], {**SAID[1], "tool_calls": "look"}]}, "message 2: tool_calls is not a list of objects"),
        ({"messages": [SAID[0], {**SAID[1], "weight": 0.5}]}, "message 2: its weight is 0.5; valid values: 0, 1"),
        ({"messages": [SAID[0], {**SAID[1], "train": "no"}]}, "message 2: its train is 'no'; valid values: False,"),
        ({"messages": [SAID[0], {**SAID[1], "train": False}]}, "no assistant message counts in the loss (weight 0,"),
        ({"instruction": "i", "input": "", "output": "o"}, "neither *; it is an Alpaca row: write it as {"),
        ({"prompt": "p", "completion": "c"}, "neither *; it is a prompt with its completion: write it as {"),
        ({"prompt": SAID[:1], "completion": SAID[1:]}, "neither *; it is a prompt with its completion: write it as {"),
        ({"chosen": SAID, "rejected": SAID}, "neither *; it is a pair of preferences: write"),
        ({"dialog": SAID}, 'neither *; its turns are under the key "dialog": rename it to messages'),
        ({"conversation": SHARED}, 'neither *; its turns are under the key "conversation": rename it to messages'),
        ({"text": "a"}, "neither *; it is plain text, as adapt and distill read it"),
        ({"a": "a"}, "neither *; fix the line"),
        ([], "does not end with an assistant message"),
    ],
)
def test_forms_that_are_refused(tmp_path: Path, content: Any, expected: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": SAID}) + "\n" + json.dumps(content) + "\n")
    with pytest.raises(UserError) as caught:
        read_conversations(str(file))
    said = str(caught.value)
    start, _, end = expected.partition("*")
    assert said.startswith(f"{file}:2: {start}") and end in said and "\n" not in said


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "rows",
    [
        [{"conversations": SHARED}] * 2,
        [{"messages": SAID}],
        [{"id": "1", "conversations": SHARED}],
        [{"instruction": "i", "input": "", "output": "o"}],
        [{"prompt": "p"}],
        [[{"User": "q", "Assistant": "a"}]] * 2,
        [SAID, SAID],
        [{"text": "a"}],
    ],
    ids=lambda rows: json.dumps(rows)[:40],
)
def test_one_array_of_rows(tmp_path: Path, rows: Any, indent: int | None) -> None:
    """Is read, or refused, as its rows on lines of their own are."""
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps(rows, indent=indent))
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for read_file in (read_conversations, read_prompts):
        found = []
        for file in (array, lines):
            try:
                found.append([getattr(each, "messages", each) for each in read_file(str(file))])
            except UserError as error:
                found.append(str(error).replace(str(file), "FILE").replace("FILE: record ", "FILE:"))
        assert found[0] == found[1]


def test_prompts_in_other_forms(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for content in ({"conversations": SHARED[:1]}, {"messages": SHARED[:1]}, {"conversations": SAID[:1]}):
        file.write_text(json.dumps(content))
        assert read_prompts(str(file)) == [Conversation(WANTED[:1])]
    asked = [SAID[0], {"role": "assistant", "content": "look()"}, {"role": "tool", "content": "drops"}]
    file.write_text(json.dumps({"messages": asked}))
    assert read_prompts(str(file)) == [read({"messages": asked})]
    for content, expected in (
        ({"instruction": "i", "output": "o"}, "it is an Alpaca row"),
        ({"prompt": "p", "messages": SAID[:1]}, "fix the line"),
        ({"dialog": SAID[:1]}, "rename it to messages"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            read_prompts(str(file))
        assert str(caught.value).startswith(f'{file}:1: neither {{"prompt": ...}} nor {{"messages": [...]}}; ')
        assert expected in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    places = {str(tmp_path / "folder"): "is a folder, not a file", str(tmp_path / "pipe"): "is a pipe, not a file"}
    places |= {"/dev/null": "is a device, not a file", str(tmp_path / "gone"): "no such file"}
    for path, expected in places.items():
        for read_file in (read_conversations, read_prompts):
            with pytest.raises(UserError) as caught:
                read_file(path)
            assert str(caught.value).startswith(f"{path}: {expected}; give a jsonl file of ")
