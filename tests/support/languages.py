"""Vocabularies of two languages: English out of Python's own manual, and Chinese that is made up."""

from __future__ import annotations

import functools
import io
import random
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece

from megatron_capgap.data import vocabulary


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


def train(file: Path, texts: list[str], kind: str, size: int, byte_fallback: bool = True) -> Path:
    """A SentencePiece model that keeps text as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
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
    """The English model of a kind with the pieces of one that has read both languages."""
    folder.mkdir(parents=True)
    first = train(folder / "en.model", english(), kind, 600)
    second = train(folder / "zh.model", [*chinese(), *english()[1500:]], kind, 1200)
    found, out = vocabulary.expand(first, second), folder / "both.model"
    out.write_bytes(found.model)
    before, after = (sentencepiece.SentencePieceProcessor(model_file=str(file)) for file in (first, out))
    return Merged(first, second, out, found.known, found.splits, before, after)
