"""Encoded conversations on disk: read once, the same ones again, and what is wrong with the files or the cache."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import DataConfig
from megatron_capgap.data import conversation_dataset as module
from megatron_capgap.data.chat_template import DefaultTemplate, JinjaTemplate
from megatron_capgap.data.conversation_dataset import ConversationDataset
from megatron_capgap.data.conversation_files import read_conversations
from megatron_capgap.data.conversation_packing import encode
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import corpus


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    tokenizer = corpus.save_sentencepiece(tmp_path / "t.model")
    files = [corpus.write_lines(tmp_path / f"{i}.jsonl", corpus.conversations(7, seed=i)) for i in range(3)]
    return DataConfig(tokenizer, train=(files[0], files[1]), valid=(files[2],), sequence_length=80)


def opened(data: DataConfig, cache: Path) -> ConversationDataset:
    tokenizer = open_tokenizer(data.tokenizer)
    return ConversationDataset(data, tokenizer, DefaultTemplate(tokenizer), cache)


def test_what_comes_back_is_what_was_encoded(data: DataConfig, tmp_path: Path) -> None:
    found = opened(data, tmp_path / "cache")
    found.build(10**6)
    training = found.open_training(3, packed=False)
    files = [conversation for file in data.train for conversation in read_conversations(file)]
    expected, _ = encode(files, DefaultTemplate(open_tokenizer(data.tokenizer)), 80)
    assert len(training) == len(expected) == 14
    rows = [training.conversations(k) for k in range(14)]
    assert all(len(row) == 1 for row in rows)
    by_tokens = {tuple(row[0].tokens): row[0].in_loss for row in rows}
    assert len(by_tokens) == 14
    for example in expected:
        assert np.array_equal(by_tokens[tuple(example.tokens)], example.in_loss)
    held_out = found.open_validation(packed=True)
    assert sum(len(held_out.conversations(k)) for k in range(len(held_out))) == 7


def test_it_is_done_once(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    opened(data, cache).build(10**6)
    folders = sorted(cache.iterdir())
    assert len(folders) == 2, "one for data.train, one for data.valid"
    monkeypatch.setattr(module, "read_conversations", lambda path: pytest.fail(f"{path} was read again"))
    opened(data, cache).build(10**6)
    monkeypatch.undo()
    assert sorted(cache.iterdir()) == folders
    # Another length, other files or other content are other arrays.
    opened(replace(data, sequence_length=90), cache).build(10**6)
    assert len(list(cache.iterdir())) == 4
    with open(data.train[0], "a") as file:
        file.write("\n")
    opened(data, cache).build(10**6)
    assert len(list(cache.iterdir())) == 5


def test_what_did_not_fit_is_said_every_time(data: DataConfig, tmp_path: Path) -> None:
    short = opened(replace(data, sequence_length=45), tmp_path / "cache")
    lines = short.build(10**6)
    assert len(lines) == 2 and lines[0].startswith(f"{data.train[0]}, {data.train[1]}: of 14 conversations ")
    assert "were truncated" in lines[0] and "within data.sequence_length 45" in lines[0]
    assert short.build(10**6) == lines
    assert opened(replace(data, sequence_length=400), tmp_path / "cache").build(10**6) == []


def test_a_cache_is_checked_against_a_smaller_model(data: DataConfig, tmp_path: Path) -> None:
    data = replace(data, sequence_length=10_000)  # nothing is cut
    opened(data, tmp_path / "cache").build(10**6)
    largest = max(
        token
        for file in (*data.train, *data.valid)
        for talk in read_conversations(file)
        for segment in DefaultTemplate(open_tokenizer(data.tokenizer)).encode(talk)
        for token in segment.tokens
    )
    assert opened(data, tmp_path / "cache").build(largest + 1) == []
    with pytest.raises(UserError, match=rf"contain the token .* \({largest}\), which has no row in the model's"):
        opened(data, tmp_path / "cache").build(largest)


def test_answers_that_begin_within_a_token_are_counted(tmp_path: Path) -> None:
    """A byte-level tokenizer merges the space at the end of a prompt with the word behind it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    trained = corpus.byte_level(corpus.texts(300, seed=3), 400, ["<s>", "</s>"])
    word = next(piece[1:] for piece in sorted(trained.get_vocab()) if piece.startswith("\u0120") and len(piece) > 2)
    talks = [[word, word], [word, "\u00e9"], [word, word, word, word]]
    lines = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]}
        for talk in talks
    ]
    file = corpus.write_lines(tmp_path / "talk.jsonl", lines)
    for end, joined in ((" ", 2), ("\n", 0), ("", 0)):
        template = "{% for m in messages %}{{ m.role }}:" + end + "{{ m.content }}</s>{% endfor %}"
        template += "{% if add_generation_prompt %}assistant:" + end + "{% endif %}"
        for trims in (False, True):  # where the space does not count for a token's place, too
            trained.post_processor = processors.ByteLevel(trim_offsets=trims)
            trained.save(str(folder / "tokenizer.json"))
            tokenizer = open_tokenizer(str(folder))
            written = JinjaTemplate(template, tokenizer, "the template")
            for talk in read_conversations(file):  # what is counted is what differs
                whole, asked = (
                    [t for s in written.encode(m) for t in s.tokens] for m in (talk, talk.upto(len(talk) - 1))
                )
                differs = whole[: len(asked)] != asked
                assert any(segment.joined for segment in written.encode(talk)) == differs, (end, trims)
            data = DataConfig(str(folder), (file,), sequence_length=99)
            for _ in range(2):  # of the cache, too
                said = ConversationDataset(data, tokenizer, written, tmp_path / "cache").build(10**6)
                assert len(said) == bool(joined), (end, trims, said)
                assert not joined or said[0].startswith(f"{file}: in {joined} of 3 conversations a token spans the")


def test_a_bad_file_leaves_nothing(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "2.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(UserError, match=r"2.jsonl:1: does not end with an assistant message"):
        opened(data, tmp_path / "cache").build(10**6)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_is_not_there_or_is_damaged(data: DataConfig, tmp_path: Path) -> None:
    found = opened(data, tmp_path / "cache")
    with pytest.raises(UserError, match="is missing: put run_dir and the data on a file system that all hosts share"):
        found.open_training(3, packed=True)
    found.build(10**6)
    for file in (tmp_path / "cache").glob("*/tokens.npy"):
        os.truncate(file, 70)
    with pytest.raises(UserError, match=r"tokens.npy: is not a numeric array .*; remove .*, it is rebuilt"):
        found.open_training(3, packed=True)


def test_pickles_are_not_opened(data: DataConfig, tmp_path: Path) -> None:
    found = opened(data, tmp_path / "cache")
    found.build(10**6)
    for file in (tmp_path / "cache").glob("*/ends.npy"):
        np.save(file, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"ends.npy: is not a numeric array"):
        found.open_training(3, packed=True)
