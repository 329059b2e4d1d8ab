"""Conversations from files, and templates: the assistant's words are told apart, what is no conversation is refused."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.chat_template import DefaultTemplate, open_template
from megatron_capgap.data.conversation_files import read_conversations
from megatron_capgap.data.messages import Conversation, Message
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from tests.support import corpus

TALK = Conversation((Message("user", "Is it raining?"), Message("assistant", "Not yet.")))
LATER = (Message("user", "And now?"), Message("assistant", "A little."))
LONGER = Conversation((Message("system", "Be brief."), *TALK, *LATER))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(conversation: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in conversation]


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_both_ways_of_writing_conversations(tmp_path: Path) -> None:
    turns = [{"User": "Is it raining?", "Assistant": "Not yet."}, {"User": "And now?", "Assistant": "A little."}]
    path = write(tmp_path / "a.jsonl", {"messages": said(LONGER)}, "\n", turns)
    assert read_conversations(path) == [LONGER, Conversation(LONGER.messages[1:])]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON"),
        ({"text": "a"}, 'neither {"messages": [...]}, {"conversations": [...]} nor a list of User and Assistant turns'),
        ({"messages": [{"content": "a"}]}, "message 1: its role is missing; valid values: ai, assistant, bard"),
        ({"messages": [{"role": "assistent", "content": "a"}]}, "message 1: its role 'assistent' is unknown; valid"),
        ({"messages": said(TALK.messages[:1] * 2)}, "does not end with an assistant message;"),
        ({"messages": said((*TALK, LONGER.messages[0]))}, "does not end with an assistant message;"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1: its role ['user'] is unknown;"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: the user's text is empty;"),
        (
            {"messages": [{"role": "user", "content": {"text": "a"}}]},
            "message 1: the user's content is of type dict;",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
            "message 1: a part of its content is of type 'image_url'; only text is supported",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "message 1: the assistant's text is empty;"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "message 1: its from 'narrator' is unknown;"),
        ({"conversations": [{"from": "human"}]}, "message 1: has no content, but from; put its text under content"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "message 1: has no content, but from, text; put its"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', "has an unpaired surrogate"),
        ("[" * 100_000 + "\n", "is nested too deeply"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1: the user's text is empty;"),
        ({"messages": [{"role": "user"}]}, "message 1: has no content, but role;"),
        ({"messages": said(TALK.upto(1))}, "does not end with an assistant message;"),
        ({"messages": said(LONGER.upto(1))}, "does not end with an assistant message;"),
        ({"messages": []}, "does not end with an assistant message;"),
        ([{"User": "a"}], "turn 1 has no Assistant;"),
        ([{"User": "a", "Assistant": ""}], "turn 1: the assistant's text is empty;"),
        (["a"], "turn 1 has no User;"),
    ],
)
def test_what_is_no_conversation(tmp_path: Path, line: Any, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": said(TALK)}, line)
    with pytest.raises(UserError) as error:
        read_conversations(path)
    assert str(error.value).startswith(f"{path}:2: {expected}") and "\n" not in str(error.value)


def test_files_without_conversations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.jsonl: no such file"):
        read_conversations(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match=r"a.jsonl: contains no conversation"):
        read_conversations(write(tmp_path / "a.jsonl", "\n"))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(corpus.save_sentencepiece(tmp_path_factory.mktemp("chat") / "t.model"))


def test_the_default_template(spaced: Tokenizer) -> None:
    template = DefaultTemplate(spaced)
    asked, answered, more, done = template.encode(LONGER)
    assert [s.in_loss for s in (asked, answered, more, done)] == [False, True, False, True]
    assert asked.tokens[0] == spaced.bos and asked.tokens.count(spaced.eos) == 2
    assert spaced.decode(answered.tokens) == "Not yet." and answered.tokens[-1] == spaced.eos
    assert spaced.decode(more.tokens) == "[|User|]And now? [|Assistant|]" and more.tokens.count(spaced.eos) == 1
    assert spaced.decode(done.tokens) == "A little." and done.tokens[-1] == spaced.eos
    question = [token for segment in template.encode(LONGER.upto(4)) for token in segment.tokens]
    assert question == [*asked.tokens, *answered.tokens, *more.tokens], "it ends where the assistant begins"
    assert template.end_of_turn_ids() == {spaced.eos}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with ChatML's two marks as special tokens, and its template."""
    folder = tmp_path_factory.mktemp("chatml")
    corpus.save_byte_level(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<|begin|>", "chat_template": CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_s_own_template_as_transformers_applies_it(folder: Path) -> None:
    ours = open_template("tokenizer", open_tokenizer(str(folder)), str(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for conversation, prompt in ((LONGER, False), (TALK, False), (LONGER.upto(2), True), (LONGER.upto(4), True)):
        segments = ours.encode(conversation)
        found = [token for segment in segments for token in segment.tokens]
        text = theirs.apply_chat_template(said(conversation), add_generation_prompt=prompt, tokenize=False)
        assert found == theirs(text, add_special_tokens=False).input_ids
    learned = [theirs.decode(segment.tokens) for segment in ours.encode(LONGER) if segment.in_loss]
    assert learned == ["Not yet.<|im_end|>\n", "A little.<|im_end|>\n"]


def test_the_default_template_in_jinja_says_the_same(folder: Path) -> None:
    tokenizer = open_tokenizer(str(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(said(LONGER), chat_template=DefaultTemplate.jinja, tokenize=False)
    found = [token for segment in DefaultTemplate(tokenizer).encode(LONGER) for token in segment.tokens]
    assert theirs.decode(found) == text
    question = theirs.apply_chat_template(
        said(LONGER.upto(2)), chat_template=DefaultTemplate.jinja, add_generation_prompt=True, tokenize=False
    )
    asked = [token for segment in DefaultTemplate(tokenizer).encode(LONGER.upto(2)) for token in segment.tokens]
    assert theirs.decode(asked) == question


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for %}", "is not valid Jinja"),
        ("{{ tools | tojson }}{{ 'a' + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages | fromjson }}", "is not valid Jinja (No filter named 'fromjson'.)"),
        ("{{ raise_exception('no system here') }}", "no system here; use other conversations or the default template"),
        ("{{ messages | length }}{{ messages[-1].content }}", "leaves out what the assistant says in message 3"),
    ],
)
def test_templates_that_cannot_be_used(folder: Path, tmp_path: Path, source: str, expected: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError) as error:
        open_template("tokenizer", open_tokenizer(str(tmp_path)), str(tmp_path)).encode(LONGER)
    assert str(error.value).startswith(f"{tmp_path}/chat_template.jinja: {expected}")


def test_a_tokenizer_without_a_template(spaced: Tokenizer, tmp_path: Path) -> None:
    path = corpus.save_byte_level(tmp_path)
    with pytest.raises(UserError, match="has no chat template; use template default"):
        open_template("tokenizer", open_tokenizer(path), path)
