"""Conversations from files, and templates: the assistant's words are told apart, what is no conversation is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from megatron_capgap.config.errors import UserError
from megatron_capgap.data.chat import DefaultTemplate, Message, open_template, read_conversations
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from tests.support import corpus

TALK = (Message("user", "Is it raining?"), Message("assistant", "Not yet."))
LONGER = (Message("system", "Be brief."), *TALK, Message("user", "And now?"), Message("assistant", "A little."))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(conversation: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in conversation]


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_both_ways_of_writing_conversations(tmp_path: Path) -> None:
    turns = [{"User": "Is it raining?", "Assistant": "Not yet."}, {"User": "And now?", "Assistant": "A little."}]
    path = write(tmp_path / "a.jsonl", {"messages": said(LONGER)}, "\n", turns)
    assert read_conversations(path) == [LONGER, LONGER[1:]]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON"),
        ({"text": "a"}, 'neither {"messages": [...]} nor a list of User and Assistant turns'),
        ({"messages": [{"content": "a"}]}, "message 1: its role is missing; one of system, user, assistant would do"),
        ({"messages": [{"role": "human", "content": "a"}]}, "message 1: its role 'human' is unknown;"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1: the user says nothing;"),
        ({"messages": [{"role": "user"}]}, "message 1: the user says nothing;"),
        ({"messages": said(TALK[1:])}, "message 1 is the assistant's, the user's is due;"),
        ({"messages": said(TALK[:1] * 2)}, "message 2 is the user's, the assistant's is due;"),
        ({"messages": said((*TALK, LONGER[0]))}, "message 3 is the system's, the user's is due;"),
        ({"messages": said(TALK[:1])}, "does not end with an assistant message;"),
        ({"messages": said(LONGER[:1])}, "does not end with an assistant message;"),
        ({"messages": []}, "does not end with an assistant message;"),
        ([{"User": "a"}], "turn 1 has no Assistant;"),
        ([{"User": "a", "Assistant": ""}], "turn 1: the assistant says nothing;"),
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
    with pytest.raises(UserError, match=r"a.jsonl: holds no conversation"):
        read_conversations(write(tmp_path / "a.jsonl", "\n"))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(corpus.save_sentencepiece(tmp_path_factory.mktemp("chat") / "t.model"))


def test_the_default_template(spaced: Tokenizer) -> None:
    template = DefaultTemplate(spaced)
    bos, eos = spaced.bos, spaced.eos
    asked, answered, more, done = template.encode(LONGER)
    assert [s.learned for s in (asked, answered, more, done)] == [False, True, False, True]
    user = spaced.encode("[|User|]Is it raining?")
    expected = [bos, *spaced.encode("Be brief."), eos, *user, eos, *spaced.encode("[|Assistant|]")]
    assert list(asked.tokens) == expected
    assert list(answered.tokens) == [*spaced.encode("Not yet."), eos]
    assert list(more.tokens) == [*spaced.encode("[|User|]And now?"), eos, *spaced.encode("[|Assistant|]")]
    assert template.encode(LONGER[:4]) == [asked, answered, more], "a question ends where the assistant begins"


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
    for conversation, prompt in ((LONGER, False), (TALK, False), (LONGER[:2], True), (LONGER[:4], True)):
        segments = ours.encode(conversation)
        found = [token for segment in segments for token in segment.tokens]
        text = theirs.apply_chat_template(said(conversation), add_generation_prompt=prompt, tokenize=False)
        assert found == theirs(text, add_special_tokens=False).input_ids
    learned = [theirs.decode(segment.tokens) for segment in ours.encode(LONGER) if segment.learned]
    assert learned == ["Not yet.<|im_end|>\n", "A little.<|im_end|>\n"]


def test_the_default_template_in_jinja_says_the_same(folder: Path) -> None:
    tokenizer = open_tokenizer(str(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(said(LONGER), chat_template=DefaultTemplate.jinja, tokenize=False)
    found = [token for segment in DefaultTemplate(tokenizer).encode(LONGER) for token in segment.tokens]
    assert theirs.decode(found) == text
    question = theirs.apply_chat_template(
        said(LONGER[:2]), chat_template=DefaultTemplate.jinja, add_generation_prompt=True, tokenize=False
    )
    asked = [token for segment in DefaultTemplate(tokenizer).encode(LONGER[:2]) for token in segment.tokens]
    assert theirs.decode(asked) == question


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for %}", "is no Jinja"),
        ("{{ raise_exception('no system here') }}", "no system here; use other conversations or the default template"),
        ("{{ messages | length }}{{ messages[-1].content }}", "writes the beginning of a conversation otherwise once"),
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
    with pytest.raises(UserError, match="brings no chat template; template default would do"):
        open_template("tokenizer", open_tokenizer(path), path)
