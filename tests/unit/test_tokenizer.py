"""Both kinds of tokenizer against their own libraries, and what each says to bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from tests.support import corpus

# U+2581 is how SentencePiece writes a space, so a text cannot keep it.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def spaced(folder: Path) -> Tokenizer:
    return open_tokenizer(corpus.save_sentencepiece(folder / "t.model"))


@pytest.fixture(scope="module")
def byte_level(folder: Path) -> Tokenizer:
    return open_tokenizer(corpus.save_byte_level(folder / "byte_level"))


def test_sentencepiece_agrees_with_its_library(spaced: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=corpus.sentencepiece_model())
    assert (spaced.vocab_size, spaced.bos, spaced.eos) == (400, 1, 2)
    for text in corpus.texts(20, seed=7):
        assert spaced.encode(text) == model.encode(text)


def test_byte_level_ids_specials_and_added_tokens(byte_level: Tokenizer) -> None:
    assert (byte_level.vocab_size, byte_level.bos, byte_level.eos) == (401, 0, 1)
    lengths = byte_level.byte_lengths()
    assert lengths[0] == lengths[1] == 0
    assert byte_level.encode("\u00e9\u00e9\u00e9") == [400] and lengths[400] == 6


@given(text=TEXT)
def test_text_survives_and_its_bytes_are_counted(text: str, spaced: Tokenizer, byte_level: Tokenizer) -> None:
    size = len(text.encode())
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert byte_level.byte_lengths()[ids].sum() == size
    ids = spaced.encode(text)
    assert spaced.decode(ids) == text
    assert spaced.byte_lengths()[ids].sum() == size + bool(text)  # one space before the text


def test_one_vocabulary_in_two_formats_is_one(spaced: Tokenizer, folder: Path) -> None:
    converted = open_tokenizer(corpus.save_sentencepiece_as_folder(folder / "converted"))
    assert (converted.bos, converted.eos) == (1, 2)
    assert converted.fingerprint == spaced.fingerprint
    np.testing.assert_array_equal(converted.byte_lengths(), spaced.byte_lengths())
    assert spaced.byte_lengths().dtype == np.int64 and spaced.byte_lengths().shape == (400,)


def test_one_piece_or_special_changes_the_fingerprint(byte_level: Tokenizer, tmp_path: Path) -> None:
    path = Path(corpus.save_byte_level(tmp_path / "a"))
    assert open_tokenizer(str(path)).fingerprint == byte_level.fingerprint
    config = {"bos_token": "<|begin|>", "eos_token": "<|begin|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_tokenizer(str(path)).fingerprint != byte_level.fingerprint
    path = Path(corpus.save_byte_level(tmp_path / "b"))
    recipe = (path / "tokenizer.json").read_text()
    assert recipe.count("\u00e9\u00e9\u00e9") == 1
    (path / "tokenizer.json").write_text(recipe.replace("\u00e9\u00e9\u00e9", "\u00e9\u00e9"))
    assert open_tokenizer(str(path)).fingerprint != byte_level.fingerprint


def test_specials_come_from_the_first_file_that_names_them(tmp_path: Path) -> None:
    path = Path(corpus.save_byte_level(tmp_path))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    assert open_tokenizer(str(path)).eos is None
    (path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert open_tokenizer(str(path)).eos == 7
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    assert (open_tokenizer(str(path)).bos, open_tokenizer(str(path)).eos) == (None, 1)


def test_folder_with_a_sentencepiece_model_only(spaced: Tokenizer, tmp_path: Path) -> None:
    corpus.save_sentencepiece(tmp_path / "tokenizer.model")
    assert open_tokenizer(str(tmp_path)).fingerprint == spaced.fingerprint


def test_bytes_of_other_vocabularies_are_not_guessed(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="bytes per token are supported for"):
        open_tokenizer(str(tmp_path)).byte_lengths()


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (None, "", "does not exist"),
        ("t.model", "", "is not a SentencePiece model"),
        ("t.model", "no model at all", "is not a SentencePiece model"),
        ("folder/vocab.json", "{}", "has vocab.json without merges.txt"),
        ("folder/added_tokens.json", "{}", "neither tokenizer.json nor tokenizer.model"),
        ("folder/tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", "{}", "give its folder"),
    ],
)
def test_bad_paths_say_what_would_do(tmp_path: Path, file: str | None, content: str, expected: str) -> None:
    path = tmp_path / (file or "nothing")
    if file:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    target = path.parent if path.parent != tmp_path else path
    with pytest.raises(UserError, match=expected) as error:
        open_tokenizer(str(target))
    assert str(target) in str(error.value) and "\n" not in str(error.value)


def test_eos_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    path = Path(corpus.save_byte_level(tmp_path))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    without = Path(corpus.save_byte_level(tmp_path / "without"))
    (without / "tokenizer_config.json").unlink()
    found, before = open_tokenizer(str(path)), open_tokenizer(str(without))
    assert found.eos == before.vocab_size == found.vocab_size - 1, "it is added, as transformers adds it"
    assert found.encode("a</s>") == [*before.encode("a"), found.eos]
