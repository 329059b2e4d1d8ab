"""A SentencePiece vocabulary that takes over the pieces of a second one, and what that is worth on a text.

New pieces get new ids behind the old ones, and scores that let them join neighbours of the old encoding and do nothing
else: text in which no new piece applies keeps exactly its old ids.

- BPE merges the pair of the best score first. New pieces rank below all old ones, in the second model's order, so that
  merging goes to its old end before the first new piece is considered.
- Unigram takes the pieces whose scores add up to most. A new piece is worth as much as the old pieces that it is made
  of, and a little more for each token that it saves: a cut through the text that the old model did not make stays as
  unlikely as it was, and of those that it made the fewest tokens win.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_capgap.common.errors import UserError
from megatron_capgap.data import corpus, sentencepiece_proto
from megatron_capgap.data.jsonl import read_blocks
from megatron_capgap.data.sentencepiece_proto import BYTE, NORMAL, Model, Piece
from megatron_capgap.data.tokenizer import Tokenizer

# What a saved token is worth in a unigram model, in nats: above the rounding of sums over a document, below what tells
# one way of cutting a word from another.
_SAVED_TOKEN = 0.25
# What a character that the first unigram model lacks is worth in new pieces, below its best piece. All ways of cutting
# a text hold the same ones, so that the number decides nothing.
_NEW_CHARACTER = -1.0


@dataclass(frozen=True)
class Expansion:
    """A vocabulary grown out of another one."""

    model: bytes
    """The SentencePiece model file; ids below `known` mean what they did."""
    known: int
    """Tokens of the first model."""
    splits: tuple[tuple[int, ...], ...]
    """For each new piece, from id `known` on, the ids of the old pieces that it splits into."""
    shared: int
    """Pieces of the second model that the first has too."""
    special: int
    """Pieces of the second model that are control, unknown, byte, user-defined or unused ones, which stay behind."""


@dataclass(frozen=True)
class Count:
    """A text in tokens of two vocabularies."""

    characters: int
    before: int
    after: int


def model_file(path: str) -> Path:
    """The SentencePiece model that a path names: a file, or a folder with tokenizer.model.

    Raises:
        UserError: nothing there.
    """
    place = Path(path)
    file = place / "tokenizer.model" if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"tokenizer {file} does not exist: give a SentencePiece .model file, or a folder that has one")
    return file


def expand(first: Path, second: Path) -> Expansion:
    """Adds to a model what a second one of the same kind has more.

    Args:
        first: keeps its ids, scores, special tokens, byte fallback and rules of normalisation.
        second: its ordinary pieces are added.

    Raises:
        UserError: no such models, models of different kinds, nothing to add, or new characters that the first model
            cannot write in bytes.
    """
    base, other = sentencepiece_proto.read(first), sentencepiece_proto.read(second)
    if base.kind != other.kind:
        raise UserError(
            f"{second} is a {other.kind} model and {first} a {base.kind} one, whose scores mean different things: "
            f"train the second one with model_type={base.kind}"
        )
    if base.kind not in _SCORES:
        raise UserError(f"{first} is a {base.kind} model, which has no pieces to merge: give models of bpe or unigram")
    ordinary = [piece for piece in other.pieces if piece.kind == NORMAL]
    there = {piece.text for piece in base.pieces}
    new = sorted((piece for piece in ordinary if piece.text not in there), key=lambda piece: -piece.score)
    if not new:
        raise UserError(f"{second}: {first} holds all its {len(ordinary)} pieces already; use that one as it is")
    splits = _splits(first, base, new)
    scores = _SCORES[base.kind](base, new, splits)
    merged = base.with_pieces([Piece(piece.text, score, NORMAL) for piece, score in zip(new, scores, strict=True)])
    special = len(other.pieces) - len(ordinary)
    return Expansion(merged.content, len(base.pieces), splits, len(ordinary) - len(new), special)


def count(file: str, before: Tokenizer, after: Tokenizer) -> Count:
    """Counts characters and tokens of a text, document by document.

    Args:
        file: .jsonl with a `text` field, or plain text whose lines count as documents; either may end with .gz.
        before, after: the vocabularies.

    Raises:
        UserError: the file is missing, is not as it should be, or holds no character.
    """
    if not Path(file).is_file():
        raise UserError(f"--text {file} does not exist or is not a file: give .jsonl or plain text in UTF-8")
    characters = old = new = 0
    for text in _documents(file):
        characters += len(text)
        old += len(before.encode(text))
        new += len(after.encode(text))
    if not characters:
        raise UserError(f"--text {file} holds no text: leave it out or give another file")
    return Count(characters, old, new)


def _documents(file: str) -> Iterator[str]:
    as_json = file.removesuffix(".gz").endswith(".jsonl")
    for block in read_blocks([file], plain=not as_json):
        for offset, line in enumerate(block.lines):
            try:
                yield corpus.parse(line, "text") if as_json else line.decode().rstrip("\r\n")
            except ValueError as problem:
                detail = " ".join(map(str, problem.args)) if as_json else "not UTF-8"
                raise UserError(f"--text {file}:{block.line + offset}: {detail}; mend the line") from None


def _splits(first: Path, base: Model, new: Sequence[Piece]) -> tuple[tuple[int, ...], ...]:
    """The old pieces that each new one splits into."""
    processor = base.processor_of_pieces()
    splits = tuple(tuple(processor.encode(piece.text)) for piece in new)
    strange = [piece.text for piece, split in zip(new, splits, strict=True) if processor.unk_id() in split]
    if strange:
        raise UserError(
            f"{first} has no byte fallback, and {len(strange)} of the new pieces hold characters that it does not know "
            f"({strange[0]!r} is the first): give a first model that was trained with byte_fallback"
        )
    return splits


def _bpe_scores(base: Model, new: Sequence[Piece], splits: Sequence[Sequence[int]]) -> list[float]:
    scores = [np.float32(min(piece.score for piece in base.pieces))]
    for _ in new:
        # LLaMA has runs of spaces at -1e9, where a model file's floats are 64 apart: equal scores would have no order.
        scores.append(min(scores[-1] - np.float32(1), np.nextafter(scores[-1], np.float32(-np.inf))))
    return [float(score) for score in scores[1:]]


def _unigram_scores(base: Model, new: Sequence[Piece], splits: Sequence[Sequence[int]]) -> list[float]:
    new_character = max(piece.score for piece in base.pieces if piece.kind == NORMAL) + _NEW_CHARACTER
    scores = []
    for piece, split in zip(new, splits, strict=True):
        known = [base.pieces[i] for i in split if base.pieces[i].kind != BYTE]
        characters = len(piece.text) - sum(len(part.text) for part in known)
        worth = sum(part.score for part in known) + characters * new_character
        scores.append(worth + _SAVED_TOKEN * (len(split) - 1))
    return scores


_SCORES = {"bpe": _bpe_scores, "unigram": _unigram_scores}
