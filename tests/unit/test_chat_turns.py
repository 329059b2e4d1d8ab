"""Where the assistant's turns begin and end, with tools, thoughts and parts, under templates as the hubs have them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.chat_template import DefaultTemplate, JinjaTemplate
from megatron_capgap.data.conversation_files import read_turns
from megatron_capgap.data.messages import Conversation
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from tests.support import chat_templates, tokenizer_zoo
from tests.support.corpus import byte_level, texts

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"where": "out"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
TALK = [
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": "Not yet."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "A little."},
]
LOOKED = [
    TALK[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "drops", "tool_call_id": "abcdefghi"},
    TALK[3],
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tokenizer, Any]]:
    """Ours and theirs, of a byte-level vocabulary with these tokens beside those of ChatML."""
    folder = tmp_path_factory.mktemp("turns")
    vocabulary = byte_level(texts(300, seed=3), 320, ["<s>", "</s>"]).to_str()
    zoo: dict[tuple[str, ...], Any] = {}

    def opened(*special: str) -> tuple[Tokenizer, Any]:
        if special not in zoo:
            place = folder / str(len(zoo))
            place.mkdir()
            settings = {**tokenizer_zoo.FAST, "unk_token": None, "additional_special_tokens": list(special)}
            (place / "tokenizer.json").write_text(vocabulary)
            (place / "tokenizer_config.json").write_text(json.dumps(settings))
            zoo[special] = tokenizer_zoo.opener({"one": place})("one")
        return zoo[special]

    return opened


def read(messages: list[dict[str, Any]], **others: Any) -> Conversation:
    return read_turns("a.jsonl:1", {"messages": messages, **others})


def learned(pair: tuple[Tokenizer, Any], source: str, messages: list[dict[str, Any]], **others: Any) -> list[str]:
    """What is learned; all ids are those of transformers."""
    ours, theirs = pair
    segments = JinjaTemplate(source, ours, "t").encode(read(messages, **others))
    found = [token for segment in segments for token in segment.tokens]
    assert found == theirs.apply_chat_template(messages, chat_template=source, return_dict=False, **others)
    return [theirs.decode(segment.tokens) for segment in segments if segment.in_loss]


@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["no tools", "none of them", "tools"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_learned_with_tools_and_without(pair: Any, key: str, tools: list[Any] | None) -> None:
    """By each of the names that transformers takes for one."""
    messages = [TALK[0], {**TALK[1], key: "clouds "}]
    found = learned(pair("<|im_start|>", "<|im_end|>"), chat_templates.THOUGHTS, messages, tools=tools)
    assert found == ["clouds Not yet.<|im_end|>\n"]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_a_turn_begins_where_a_prompt_with_the_tools_ends(pair: Any, tools: list[Any] | None) -> None:
    """Without a loop that shows where a turn begins."""
    found = learned(pair("<|im_start|>", "<|im_end|>"), chat_templates.THINKS_AT_ONCE, TALK, tools=tools)
    assert found == ["<think>Not yet.<|im_end|>\n", "<think>A little.<|im_end|>\n"]
    assert read(TALK, tools=tools).upto(1).tools == tools


def test_the_first_name_of_thoughts_counts(pair: Any) -> None:
    source = chat_templates.THOUGHTS.replace("<|im_end|>", "{{ m.thinking }}{{ m.reasoning }}{{ m.mood }}<|im_end|>")
    answer = {**TALK[1], "reasoning": "3", "thinking": "2", "reasoning_content": None, "mood": "4"}
    assert learned(pair(), source, [TALK[0], answer]) == ["2Not yet.234<|im_end|>\n"]
    del answer["thinking"]
    assert learned(pair(), source, [TALK[0], answer]) == ["3Not yet.334<|im_end|>\n"]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", ["LLAMA_3_1", "MISTRAL_V3"])
def test_calls_are_learned_with_tools_and_without(pair: Any, name: str, tools: list[Any] | None) -> None:
    marks = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]")
    call, answer = {
        "LLAMA_3_1": ('{"name": "look", "parameters": {"where": "out"}}<|eot_id|>', "A little.<|eot_id|>"),
        "MISTRAL_V3": (
            '[TOOL_CALLS] [{"name": "look", "arguments": {"where": "out"}, "id": "abcdefghi"}]</s>',
            " A little.</s>",
        ),
    }[name]
    source = getattr(chat_templates, name)
    assert learned(pair(*marks), source, LOOKED, tools=tools) == [call, answer]
    plain = [f" {TALK[1]['content']}</s>" if name == "MISTRAL_V3" else "Not yet.<|eot_id|>", answer]
    assert [text.strip() for text in learned(pair(*marks), source, TALK, tools=tools)] == [t.strip() for t in plain]
    # Mistral's template writes the tools before the last user's turn, and so each prompt has them elsewhere.
    found = learned(pair(*marks), source, [*LOOKED, *TALK[:2]], tools=tools)
    assert [text.strip() for text in found] == [call, answer.strip(), plain[0].strip()]


@pytest.mark.parametrize("special", [("<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"), ("<|end|>",), ()])
@pytest.mark.parametrize("name", ["PHI_3", "PHI_3_BY_ROLE", "PHI_3_AT_ONCE"])
def test_what_follows_a_turn_is_not_learned(pair: Any, name: str, special: tuple[str, ...]) -> None:
    """What closes the text begins as the next turn does."""
    found = learned(pair(*special), getattr(chat_templates, name), TALK)
    assert found == ["Not yet.<|end|>\n", "A little.<|end|>\n<|endoftext|>"]


@pytest.mark.parametrize("special", [("<|end|>", "<|return|>", "<|start|>"), ()])
def test_a_last_turn_that_ends_otherwise(pair: Any, special: tuple[str, ...]) -> None:
    found = learned(pair(*special), chat_templates.RETURN, TALK)
    assert found == ["Not yet.<|end|>", "A little.<|return|>"]


@pytest.mark.parametrize("source", [chat_templates.THOUGHTS, chat_templates.MARKED], ids=["unmarked", "marked"])
@pytest.mark.parametrize("out", [{"weight": 0}, {"train": False}], ids=str)
def test_an_answer_may_be_context_alone(pair: Any, source: str, out: dict[str, Any]) -> None:
    kept = {"weight": 1} if "weight" in out else {"train": True}
    first, last = learned(pair(), source, [TALK[0], {**TALK[1], **kept}, *TALK[2:]])
    assert first.startswith("Not yet.") and last.startswith("A little.")
    assert learned(pair(), source, [TALK[0], {**TALK[1], **out}, *TALK[2:]]) == [last]
    assert learned(pair(), source, [*TALK[:3], {**TALK[3], **out}]) == [first]


@pytest.mark.parametrize("name", ["LLAMA_3_1", "MISTRAL_V3"])
def test_words_beside_a_call_may_be_left_out(pair: Any, name: str) -> None:
    """As those templates do."""
    source = getattr(chat_templates, name)
    beside = [LOOKED[0], {**LOOKED[1], "content": "Let me look."}, *LOOKED[2:]]
    assert learned(pair(), source, beside, tools=TOOLS) == learned(pair(), source, LOOKED, tools=TOOLS)


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    halves = message["content"][:3], message["content"][3:]
    return {**message, "content": [{"type": "text", "text": half} for half in halves]}


@pytest.mark.parametrize("name", ["PARTS_ONLY", "PARTS_TRIMMED"])
def test_parts_are_handed_on(pair: Any, name: str) -> None:
    found = learned(pair("<|im_start|>", "<|im_end|>"), getattr(chat_templates, name), [*map(in_parts, TALK)])
    first = "Not yet." if name == "PARTS_ONLY" else "Notyet."
    assert found == [f"{first}<|im_end|>\n", "A little.<|im_end|>\n"]
    ours, theirs = pair("<|im_start|>", "<|im_end|>")
    ends = JinjaTemplate(getattr(chat_templates, name), ours, "t").end_of_turn_ids()
    assert ends == {theirs.convert_tokens_to_ids("<|im_end|>")}


def test_parts_where_transformers_fails_become_one_text(pair: Any) -> None:
    ours, theirs = pair()
    with pytest.raises(TypeError):
        theirs.apply_chat_template([*map(in_parts, TALK)], chat_template=DefaultTemplate.JINJA)
    assert DefaultTemplate(ours).encode(read([*map(in_parts, TALK)])) == DefaultTemplate(ours).encode(read(TALK))


@pytest.mark.parametrize(
    "name, messages, expected",
    [
        ("THOUGHTS", [*map(in_parts, TALK)], "t: prints as a list the content of message 1, which is in parts"),
        ("TEXT_ONLY", [*map(in_parts, TALK)], "t: leaves out the content of message 1, which is in parts"),
        ("PARTS_ONLY", TALK, "t: leaves out what the assistant says in message 2"),
        ("TEXT_ONLY", LOOKED, "t: leaves out what the assistant calls in message 2"),
    ],
)
def test_templates_that_leave_words_out(pair: Any, name: str, messages: list[dict[str, Any]], expected: str) -> None:
    ours, _ = pair()
    with pytest.raises(UserError) as caught:
        JinjaTemplate(getattr(chat_templates, name), ours, "t").encode(read(messages))
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_thoughts_alone_are_learned(pair: Any) -> None:
    for content in ("", None):
        answer = {"role": "assistant", "content": content, "reasoning": "clouds"}
        assert learned(pair(), chat_templates.THOUGHTS, [TALK[0], answer]) == ["clouds<|im_end|>\n"]


def test_what_generation_writes_may_be_worked_on(pair: Any) -> None:
    ours, theirs = pair()
    source = "{% for m in messages %}{% set said %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }} "
    source += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endset %}[{{ said | trim }}]\n{% endfor %}"
    segments = JinjaTemplate(source, ours, "t").encode(read(TALK))
    how = {"chat_template": source, "return_assistant_tokens_mask": True, "return_dict": True}
    expected = theirs.apply_chat_template(TALK, **how)
    assert [token for s in segments for token in s.tokens] == expected["input_ids"]
    assert [int(s.in_loss) for s in segments for _ in s.tokens] == expected["assistant_masks"]


def test_a_user_defined_piece_ends_a_turn(tmp_path: Path) -> None:
    zoo = tokenizer_zoo.build(tmp_path)
    for kind in ("sentencepiece_symbols", "sentencepiece_llama_symbols"):
        ours, theirs = tokenizer_zoo.opener(zoo)(kind)
        for opened in (ours, open_tokenizer(str(zoo[kind] / "tokenizer.model"))):
            ends = JinjaTemplate(chat_templates.THOUGHTS, opened, "t").end_of_turn_ids()
            assert ends == {theirs.convert_tokens_to_ids("<|im_end|>")}


USER, ANSWER, MORE = TALK[0], TALK[1], TALK[3]
ORDERS = {
    "two users": [USER, TALK[2], ANSWER],
    "two answers": [USER, ANSWER, MORE],
    "an answer twice": [USER, ANSWER, ANSWER],
    "the assistant first": [ANSWER, USER, MORE],
    "the assistant alone": [MORE],
    "the assistant twice first": [ANSWER, MORE, USER, TALK[2], ANSWER, ANSWER],
    "after the system": [{"role": "system", "content": "Be brief."}, ANSWER, USER, MORE],
    "the system within": [USER, {"role": "system", "content": "Be brief."}, ANSWER],
    "a tool that nobody called": [USER, {"role": "ipython", "content": "drops"}, ANSWER],
}
ENDS = {
    "ASKED_FIRST": "<|im_end|>\n",
    "LLAMA_3_1": "<|eot_id|>",
    "PHI_3": "<|end|>\n",
    "RETURN": "<|end|>",
    "MARKED": "<|im_end|>",
    "THOUGHTS_BEGUN": "</s>",
    "MERGED": "<end>",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["MISTRAL_V3", "ALTERNATING", *ENDS])
def test_turns_in_any_order(pair: Any, name: str, order: str) -> None:
    """The template decides, as in transformers; every answer is learned with its end."""
    source, messages = getattr(chat_templates, name), ORDERS[order]
    ours, theirs = pair("<|im_start|>", "<|im_end|>")
    try:
        theirs.apply_chat_template(messages, chat_template=source)
    except Exception as error:
        with pytest.raises(UserError) as caught:
            JinjaTemplate(source, ours, "t").encode(read(messages))
        said = str(caught.value)
        assert said.startswith("t: ") and "\n" not in said and (str(error) in said or "ipython" in str(messages))
        return
    found = learned((ours, theirs), source, messages)
    if name == "MERGED":  # one turn for several answers
        assert found[-1].endswith("<end>")
        assert "".join(found).count("Not yet.") == messages.count(ANSWER)
        return
    last = {"RETURN": "<|return|>", "PHI_3": "<|end|>\n<|endoftext|>"}.get(name, ENDS[name])
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert found == [*(text + ENDS[name] for text in answers[:-1]), answers[-1] + last]


@pytest.mark.parametrize("role", ["ipython", "observation", "tool"])
@pytest.mark.parametrize("name", ["OBSERVATION", "TOOL"])
def test_a_tool_by_the_name_that_the_template_knows(pair: Any, name: str, role: str) -> None:
    ours, theirs = pair()
    messages = [USER, {"role": role, "content": "drops"}, ANSWER]
    source = getattr(chat_templates, name)
    ids = [token for s in JinjaTemplate(source, ours, "t").encode(read(messages)) for token in s.tokens]
    told = theirs.decode(ids)
    assert ("drops" in told) == ((name, role) != ("OBSERVATION", "tool"))
    if "drops" in theirs.apply_chat_template(messages, chat_template=source, tokenize=False):
        assert ids == theirs.apply_chat_template(messages, chat_template=source, return_dict=False)


@pytest.mark.parametrize(
    "source, ends",
    [
        (chat_templates.MARKED_WHOLE, ["<|im_end|>"]),
        (chat_templates.MARKED, ["<|im_end|>"]),
        (chat_templates.CALLS, ["<|call|>", "<|im_end|>"]),
        (chat_templates.CALLS.replace("<|call|>", "<|im_end|>\n"), ["<|im_end|>"]),
        (chat_templates.LLAMA_3_1, ["<|eot_id|>"]),
        (chat_templates.MISTRAL_V3, ["</s>"]),
    ],
    ids=["marked with its header", "marked", "a call", "a call with the same end", "LLaMA 3.1", "Mistral v3"],
)
def test_what_ends_a_text(pair: Any, source: str, ends: list[str]) -> None:
    ours, theirs = pair("<|im_start|>", "<|im_end|>", "<|call|>", "<tool_call>", "</tool_call>", "<|eot_id|>")
    assert sorted(theirs.convert_ids_to_tokens(sorted(JinjaTemplate(source, ours, "t").end_of_turn_ids()))) == ends


def test_a_marked_template_that_leaves_calls_out(pair: Any) -> None:
    ours, _ = pair("<|im_start|>", "<|im_end|>")
    with pytest.raises(UserError, match="t: leaves out what the assistant calls in message 2"):
        JinjaTemplate(chat_templates.MARKED_WHOLE, ours, "t").encode(read(LOOKED))
