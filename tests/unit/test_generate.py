"""tools/generate.py: what it refuses, before anything is started; and how prompts become ids."""

import json
from pathlib import Path

import pytest

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.chat_template import DefaultTemplate
from megatron_capgap.data.messages import Conversation, Message
from megatron_capgap.data.prompts import encode_prompt, read_prompts
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from tests.support import corpus

USER = {"role": "user", "content": "Is it raining?"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(corpus.save_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


def test_text_and_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [{"prompt": "Once upon"}, {"messages": [{"role": "system", "content": "Be brief."}, USER]}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    text, talk = read_prompts(str(tmp_path / "a.jsonl"))
    assert text == "Once upon"
    assert talk == Conversation((Message("system", "Be brief."), Message("user", "Is it raining?")))

    def template() -> DefaultTemplate:
        return DefaultTemplate(tokenizer)

    assert encode_prompt(text, tokenizer, template, begin=False) == tokenizer.encode("Once upon")
    assert encode_prompt(text, tokenizer, template, begin=True) == [tokenizer.bos, *tokenizer.encode("Once upon")]
    for begin in (False, True):
        asked = encode_prompt(talk, tokenizer, template, begin)
        assert asked.count(tokenizer.bos) == 1 and asked.count(tokenizer.eos) == 2
        assert tokenizer.decode(asked).endswith("[|Assistant|]")


NOT_ASKED = ":1: does not end with a user or tool message for the assistant to answer; add one"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", 'contains no prompt; a line is {"prompt": "..."} or {"messages": [...]}'),
        ("{", ":1: not JSON (Expecting property name"),
        ('{"text": "a"}', ':1: neither {"prompt": ...} nor {"messages": [...]}; it is plain text, as'),
        ('{"prompt": "a", "messages": []}', ':1: neither {"prompt": ...} nor {"messages": [...]}; fix the line'),
        ('{"prompt": ""}', ":1: prompt is ''; write a non-empty text"),
        (
            '{"messages": []}',
            NOT_ASKED,
        ),
        (
            json.dumps({"messages": [USER, {"role": "assistant", "content": "Not yet."}]}),
            NOT_ASKED,
        ),
        (
            json.dumps({"messages": [{"role": "user"}]}),
            ":1: message 1: has no content, but role;",
        ),
    ],
)
def test_lines_that_are_no_prompt(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line)
    with pytest.raises(UserError) as error:
        read_prompts(str(file))
    assert str(error.value).removeprefix(str(file)).removeprefix(": ").startswith(expected)
