"""Tokenizer folders of every kind against transformers' AutoTokenizer: ids, lengths, special tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_capgap.config.errors import UserError
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import tokenizer_zoo

NAMES = [name for name, _ in tokenizer_zoo.kinds(b"", {})]
WORDS = [
    "hello world, the quick",
    " two  spaces ",
    "hi</s>hello <|im_start|>user\nhello<|im_end|>\n",
    "\u2581x <s> a",
    "<ctl>a<|im_end|> <|im_start|> b",
    "\ufb01 \u00bd e\u0301 \u65e5\u672c \U0001f600",
    "\tint main() {\n    return 0;\n}\n",
    "the cat sat on the mat " * 30,
    " ",
    "",
]
PIECES = st.sampled_from(
    ["<s>", "</s>", "<|im_start|>", "<|im_end|>", " ", "  ", "\n", "the", "cat", "1", "\u00e9", "\u2581"]
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tokenizer_zoo.build(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def pair(zoo: dict[str, Path]) -> Any:
    """Ours and theirs, opened once."""
    return tokenizer_zoo.opener(zoo)


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_special_tokens_are_those_of_transformers(pair: Any, name: str) -> None:
    ours, theirs = pair(name)
    for text in WORDS:
        expected = theirs(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        assert ours.encode(text) == expected, text
        whole = theirs(text, truncation=False, padding=False)["input_ids"]
        assert [*ours.before, *expected, *ours.after] == whole, text
    assert ours.vocab_size == len(theirs)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.stops == ({ours.eos} if ours.eos is not None else set())


@pytest.mark.parametrize("name", NAMES)
@given(pieces=st.lists(PIECES, max_size=12))
def test_any_text_has_the_ids_of_transformers(pair: Any, name: str, pieces: list[str]) -> None:
    ours, theirs = pair(name)
    text = "".join(pieces)
    assert ours.encode(text) == theirs(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_each_id_knows_its_place_in_the_text(pair: Any, name: str) -> None:
    ours, _ = pair(name)
    text = "the cat sat <|im_start|> on 日本 the mat"
    ids, places = ours.encode_with_places(text)
    assert ids == ours.encode(text) and len(ids) == len(places)
    starts = [start for start, _ in places]
    assert starts == sorted(starts) and 0 <= starts[0] and places[-1][1] == len(text)


def test_a_text_is_neither_cut_nor_padded(zoo: dict[str, Path], pair: Any) -> None:
    ours, _ = pair("cut_and_padded")
    whole, _ = pair("prepend")
    for text in ("hi", "the cat sat on the mat " * 30):
        assert ours.encode(text) == whole.encode(text)


def test_a_model_may_stop_at_several_ids(zoo: dict[str, Path], tmp_path: Path) -> None:
    """As in LLaMA 3's generation_config.json."""
    shutil.copytree(zoo["prepend"], tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    found = open_tokenizer(str(tmp_path / "copy"))
    assert found.eos == 2 and found.stops == {2, 5, 9}


@pytest.mark.parametrize(
    "file, content, expected",
    [
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token 3 is no text: save the tokenizer again"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": "x", "8": 7}}, "a token is written as 7"),
        ("generation_config.json", {"eos_token_id": ["</s>"]}, "eos_token_id ['</s>'] is no number"),
        ("added_tokens.json", "[", "is not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_line(
    zoo: dict[str, Path], tmp_path: Path, file: str, content: Any, expected: str
) -> None:
    shutil.copytree(zoo["no_config"], tmp_path / "copy")
    (tmp_path / "copy" / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        open_tokenizer(str(tmp_path / "copy"))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
