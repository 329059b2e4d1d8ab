"""Conversations under every kind of tokenizer and template: the ids are those of transformers, and so are the masks."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_capgap.common.errors import UserError
from megatron_capgap.conversion.tokenizer_files import Copied, write
from megatron_capgap.data import tokenizer_folder
from megatron_capgap.data.chat_template import DefaultTemplate, JinjaTemplate, Template, open_template
from megatron_capgap.data.conversation_files import read_conversations
from megatron_capgap.data.messages import Conversation, Message
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from tests.support import tokenizer_zoo

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %} [INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MARKED = (
    "{%- for message in messages %}\n{%- if message.role == 'assistant' %}\n<|im_start|>assistant\n"
    "{%- generation %}\n{{- message.content + '<|im_end|>' }}\n{%- endgeneration %}\n"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}\n{%- endif %}\n"
    "{%- endfor %}"
)
# As Qwen3's: an earlier answer is written without its thoughts, the last one always with some, tools come first.
THINKING = (
    "{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set said = message.content %}"
    "{%- set thought = '' %}{%- if '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<think>\n' + thought + '\n</think>\n\n' }}"
    "{%- endif %}{{- said }}"
    "{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + (call | tojson) + '</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>' + message.content + '</tool_response><|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = {
    "default": DefaultTemplate.JINJA,
    "chatml": CHATML,
    "mistral": MISTRAL,
    "marked": MARKED,
    "thinking": THINKING,
}
TALK = (
    Message("user", "Is it raining?"),
    Message("assistant", "The answer: not yet."),
    Message("user", " And </s> now? <|im_end|>"),
    Message("assistant", "A little.\nThe end"),
)
KINDS = [
    "sentencepiece",
    "sentencepiece_llama_legacy_True",
    "sentencepiece_llama_listed",
    "unigram",
    "prepend",
    "prepend_llama_legacy_False",
    "metaspace_first",
    "metaspace_always",
    "metaspace_never",
    "byte_level",
    "added_tokens_json",
    "added_tokens_decoder",
    "bos",
    "cut_and_padded",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ours and theirs, opened once."""
    return tokenizer_zoo.opener(tokenizer_zoo.build(tmp_path_factory.mktemp("zoo")))


def template_of(name: str, tokenizer: Tokenizer) -> Template:
    return DefaultTemplate(tokenizer) if name == "default" else JinjaTemplate(TEMPLATES[name], tokenizer, name)


def talk(messages: Any) -> Conversation:
    return messages if isinstance(messages, Conversation) else Conversation(tuple(messages))


def tokens(template: Template, messages: Any) -> list[int]:
    return [token for segment in template.encode(talk(messages)) for token in segment.tokens]


def mask(template: Template, messages: Any) -> list[int]:
    return [int(segment.in_loss) for segment in template.encode(talk(messages)) for _ in segment.tokens]


def theirs_of(theirs: Any, name: str, messages: Any, **how: Any) -> Any:
    said = [message.content() for message in messages]
    how = {"truncation": False, "padding": False, **how}
    return theirs.apply_chat_template(said, chat_template=TEMPLATES[name], tokenize=True, return_dict=True, **how)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_apply_chat_template(pair: Any, kind: str, name: str) -> None:
    ours, theirs = pair(kind)
    template = template_of(name, ours)
    for messages in (TALK[:2], TALK):
        assert tokens(template, messages) == theirs_of(theirs, name, messages)["input_ids"]
    for messages in (TALK[:1], TALK[:3]):
        expected = theirs_of(theirs, name, messages, add_generation_prompt=True)["input_ids"]
        assert tokens(template, messages) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_marks_give_the_mask_of_transformers(pair: Any, kind: str) -> None:
    ours, theirs = pair(kind)
    expected = theirs_of(theirs, "marked", TALK, return_assistant_tokens_mask=True)
    template = template_of("marked", ours)
    assert mask(template, TALK) == expected["assistant_masks"] and any(expected["assistant_masks"])
    assert tokens(template, TALK) == expected["input_ids"]


@pytest.mark.parametrize("name, end", [("default", "</s>"), ("chatml", "<|im_end|>\n"), ("mistral", "</s>")])
@pytest.mark.parametrize("kind", ["sentencepiece_llama_listed", "prepend", "metaspace_never", "byte_level"])
def test_the_assistant_s_words_and_the_end_of_its_turn_are_learned(pair: Any, kind: str, name: str, end: str) -> None:
    ours, theirs = pair(kind)
    end = (ours.special["eos_token"] if name != "chatml" else end) or end
    learned = [theirs.decode(s.tokens) for s in template_of(name, ours).encode(talk(TALK)) if s.in_loss]
    assert [text.strip(" ") for text in learned] == [TALK[1].text + end, TALK[3].text + end]


def test_a_template_that_drops_earlier_thoughts(pair: Any) -> None:
    ours, theirs = pair("added_tokens_decoder")
    thinking = (
        TALK[0],
        Message("assistant", "<think>\nclouds\n</think>\n\nNot yet."),
        Message("user", "And now?"),
        Message("assistant", "<think>\ndrops\n</think>\n\nA little."),
    )
    template = template_of("thinking", ours)
    learned = [theirs.decode(s.tokens).replace("> ", ">") for s in template.encode(talk(thinking)) if s.in_loss]
    assert learned == ["Not yet.<|im_end|>\n", "<think>\ndrops\n</think>\n\nA little.<|im_end|>\n"]


def test_tools_are_context_and_their_calls_are_learned(pair: Any, tmp_path: Path) -> None:
    ours, theirs = pair("added_tokens_decoder")
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "out"}}}
    line = {
        "messages": [
            {"role": "user", "content": "Is it raining?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "drops"},
            {"role": "assistant", "content": "A little."},
        ],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps(line) + "\n")
    (conversation,) = read_conversations(str(file))
    template = template_of("thinking", ours)
    expected = theirs_of(theirs, "thinking", conversation, tools=line["tools"])["input_ids"]
    assert tokens(template, conversation) == expected
    first, last = [theirs.decode(s.tokens).replace("> ", ">") for s in template.encode(conversation) if s.in_loss]
    assert first == f"<tool_call>{json.dumps(call)}</tool_call><|im_end|>\n"
    assert last.endswith("A little.<|im_end|>\n") and "drops" not in last


OTHER = "{% for m in messages %}{{ m.role }}{% endfor %}"
LIST = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": THINKING}]
NAMED: dict[str, dict[str, Any]] = {
    "one in the settings": {"tokenizer_config.json": CHATML},
    "a list in the settings": {"tokenizer_config.json": [*LIST, {"name": "rag", "template": OTHER}]},
    "by name in the settings": {"tokenizer_config.json": {"default": CHATML, "tool_use": THINKING, "rag": OTHER}},
    "one by name": {"tokenizer_config.json": {"default": CHATML}},
    "a list of one": {"tokenizer_config.json": LIST[:1]},
    "files": {"chat_template.jinja": CHATML, "additional_chat_templates/tool_use.jinja": THINKING},
    "files before settings": {"tokenizer_config.json": LIST, "chat_template.jinja": CHATML},
    "named files before settings": {"tokenizer_config.json": LIST, "additional_chat_templates/default.jinja": CHATML},
    "a named default": {"chat_template.jinja": OTHER, "additional_chat_templates/default.jinja": CHATML},
    "marks in one": {"chat_template.jinja": CHATML, "additional_chat_templates/tool_use.jinja": MARKED},
    "for tools alone": {"additional_chat_templates/tool_use.jinja": THINKING},
}


def with_templates(pair: Any, folder: Path, files: dict[str, Any]) -> tuple[Tokenizer, Any]:
    """The tokenizer of a folder with chat templates: ours and theirs."""
    ours, _ = pair("added_tokens_decoder")
    shutil.copytree(ours._folder, folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            settings = json.loads((folder / name).read_text())
            content = json.dumps({**settings, "chat_template": content})
        (folder / name).write_text(content)
    return open_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "tools", [None, [], [{"type": "function", "function": {"name": "look"}}]], ids=["no", "0", "1"]
)
@pytest.mark.parametrize("name", NAMED)
def test_of_several_templates_the_one_of_transformers_is_used(
    pair: Any, tmp_path: Path, name: str, tools: list[Any] | None
) -> None:
    ours, theirs = with_templates(pair, tmp_path / "copy", NAMED[name])
    template = open_template("tokenizer", ours, str(tmp_path / "copy"))
    for turns in (1, 2, 3, 4):
        messages = Conversation(TALK[:turns], tools)
        said = [message.content() for message in messages]
        how = {"add_generation_prompt": turns % 2 == 1, "tools": tools, "return_dict": True}
        if name == "for tools alone" and tools is None:
            with pytest.raises(UserError, match=r"has chat templates \(tool_use\), none of which is named default"):
                template.encode(messages)
            continue
        assert tokens(template, messages) == theirs.apply_chat_template(said, **how)["input_ids"]
        learned = [theirs.decode(s.tokens).replace("> ", ">") for s in template.encode(messages) if s.in_loss]
        assert len(learned) == turns // 2
        assert all(text.rstrip("\n").endswith(f"{TALK[2 * i + 1].text}<|im_end|>") for i, text in enumerate(learned))
    assert template.end_of_turn_ids() == {theirs.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("name", ["a list in the settings", "files", "one in the settings"])
def test_every_template_is_exported(pair: Any, tmp_path: Path, name: str) -> None:
    """Those of the run, and none that only came with its tokenizer."""
    ours, theirs = with_templates(pair, tmp_path / "copy", NAMED[name])
    template = open_template("tokenizer", ours, str(tmp_path / "copy"))
    with_templates(pair, tmp_path / "other", {"additional_chat_templates/gone.jinja": OTHER})
    words = Copied(tokenizer_folder.read(tmp_path / "other"), folder=tmp_path / "other")
    (tmp_path / "export").mkdir()
    write(tmp_path / "export", words, template.jinja)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == theirs.chat_template == template.jinja


@pytest.mark.parametrize(
    "content, expected",
    [
        ([{"name": "default"}], 'chat_template has {"name": "default"}, which is not a name with a template'),
        (
            [{"name": "../a", "template": "b"}],
            'chat_template has {"name": "../a", "template": "b"}, which is not a name',
        ),
        (["b"], 'chat_template has "b", which is not a name with a template; save the tokenizer again'),
        ({"default": 3}, 'chat_template has {"name": "default", "template": 3}, which is not a name with a template'),
        (["abc"], 'chat_template has "abc", which is not a name with a template; save the tokenizer again'),
        (3, "chat_template is neither a text nor named templates; save the tokenizer again"),
        ([{"name": "tool_use", "template": "{% if %}"}], "is not valid Jinja"),
    ],
)
def test_a_damaged_list_of_templates_is_one_line(pair: Any, tmp_path: Path, content: Any, expected: str) -> None:
    ours, _ = pair("added_tokens_decoder")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))
    with pytest.raises(UserError) as caught:
        open_template("tokenizer", ours, str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer_config.json'}: {expected}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_ways_of_writing_one_conversation(tmp_path: Path, packed: bool) -> None:
    wanted = Conversation((Message("system", "Be brief."), *TALK[:2]))
    lines: list[Any] = [
        {"messages": [message.content() for message in wanted]},
        {"messages": [{"role": m.role, "content": [{"type": "text", "text": m.text}]} for m in wanted]},
        {
            "conversations": [
                {"from": speaker, "value": message.text}
                for speaker, message in zip(("system", "human", "gpt"), wanted, strict=True)
            ]
        },
        {"system": "Be brief.", "conversations": [{"from": m.role, "value": m.text} for m in TALK[:2]]},
    ]
    content = b"\xef\xbb\xbf" + "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = tmp_path / "talk.jsonl"
    file.write_bytes(gzip.compress(content) if packed else content)
    found = read_conversations(str(file))
    assert [conversation.plain() for conversation in found] == [wanted] * 4
    assert [message.words for message in found[1]] == [({"type": "text", "text": m.text},) for m in wanted]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("é".encode("latin-1"), ":1: not UTF-8 (byte 0xe9 at column 1); convert the file"),
        (b"PAR1abcd", ": is a damaged file in parquet format ("),
        (b"\x28\xb5\x2f\xfdabcd", " is damaged after line 0"),
        (gzip.compress(b"{}\n" * 1000)[:-9], " is damaged after line"),
        ('{"messages": []}'.encode("utf-16"), ": is text in UTF-16"),
        (b'[\n{"messages": []}\n]\n', ": record 1: "),
        (b'[{"messages": []}, {"messages": []}]', ": record 1: "),
    ],
    ids=["latin-1", "parquet", "zstd", "damaged", "utf-16", "array", "array in a line"],
)
def test_what_a_file_is_when_it_is_no_jsonl(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_conversations(str(file))
    assert str(caught.value).startswith(f"{file}{expected}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, end", [("default", "</s>"), ("chatml", "<|im_end|>"), ("marked", "<|im_end|>"), ("thinking", "<|im_end|>")]
)
def test_where_a_turn_ends(pair: Any, name: str, end: str) -> None:
    """A model whose own end of text is another one stops at the end of a turn."""
    ours, theirs = pair("added_tokens_json")
    assert template_of(name, ours).end_of_turn_ids() == {theirs.convert_tokens_to_ids(end)}
