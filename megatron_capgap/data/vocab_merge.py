"""Adds the pieces of a second SentencePiece model to a first one, and counts the tokens saved on a text.

New pieces get ids after the old ones, and scores that only let them join adjacent pieces of the old encoding: text in
which no new piece applies keeps exactly its old ids.

- BPE merges the pair with the best score first. New pieces rank below all old ones, in the second model's order, so all
  old merges are done before the first new piece is considered.
- Unigram selects the pieces with the largest sum of scores. The score of a new piece is the sum over the old pieces
  that it replaces, plus a small bonus for each token that it saves: the old model's segmentation stays the best one,
  and among equivalent ones the fewest tokens win.
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

# Bonus for a saved token in a unigram model, in nats: above the rounding error of sums over a document, below the score
# difference between segmentations of a word.
_SAVED_TOKEN = 0.25
# Score of a character that the first unigram model lacks, relative to its best piece. Every segmentation of a text has
# the same characters, so the value does not affect the result.
_NEW_CHARACTER = -1.0


@dataclass(frozen=True)
class Expansion:
    """An expanded vocabulary."""

    model: bytes
    """The SentencePiece model file; ids below `known` are unchanged."""
    known: int
    """Tokens of the first model."""
    splits: tuple[tuple[int, ...], ...]
    """For each new piece, from id `known` on, the ids of the old pieces that it splits into."""
    shared: int
    """Pieces of the second model that the first also has."""
    special: int
    """Control, unknown, byte, user-defined and unused pieces of the second model, which are not added."""


@dataclass(frozen=True)
class Count:
    """Characters of a text, and its tokens before and after the expansion."""

    characters: int
    before: int
    after: int


def model_file(path: str) -> Path:
    """The SentencePiece model at a path: a file, or a folder with tokenizer.model.

    Raises:
        UserError: there is no such file.
    """
    place = Path(path)
    file = place / "tokenizer.model" if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"tokenizer {file} does not exist: give a SentencePiece .model file, or a folder that has one")
    return file


def expand(first: Path, second: Path) -> Expansion:
    """Adds to a model the pieces that it lacks from a second model of the same kind.

    Args:
        first: keeps its ids, scores, special tokens, byte fallback and normalisation rules.
        second: its ordinary pieces are added.

    Raises:
        UserError: a file is not a model, the kinds differ, there is nothing to add, or a piece has new characters and
            the first model has no byte fallback.
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
        raise UserError(f"{second}: {first} already has all its {len(ordinary)} pieces; use the first one unchanged")
    splits = _splits(first, base, new)
    scores = _SCORES[base.kind](base, new, splits)
    merged = base.with_pieces([Piece(piece.text, score, NORMAL) for piece, score in zip(new, scores, strict=True)])
    special = len(other.pieces) - len(ordinary)
    return Expansion(merged.content, len(base.pieces), splits, len(ordinary) - len(new), special)


def count(file: str, before: Tokenizer, after: Tokenizer) -> Count:
    """Counts characters and tokens of a text, document by document.

    Args:
        file: .jsonl with a `text` field, or plain text whose lines count as documents; either may end with .gz.
        before, after: the tokenizers.

    Raises:
        UserError: the file is missing, malformed or empty.
    """
    if not Path(file).is_file():
        raise UserError(f"--text {file} does not exist or is not a file: give .jsonl or plain text in UTF-8")
    characters = old = new = 0
    for text in _documents(file):
        characters += len(text)
        old += len(before.encode(text))
        new += len(after.encode(text))
    if not characters:
        raise UserError(f"--text {file} contains no text: omit it or give another file")
    return Count(characters, old, new)


def _documents(file: str) -> Iterator[str]:
    as_json = file.removesuffix(".gz").endswith(".jsonl")
    for block in read_blocks([file], plain=not as_json):
        for offset, line in enumerate(block.lines):
            try:
                yield corpus.parse(line, "text") if as_json else line.decode().rstrip("\r\n")
            except ValueError as problem:
                detail = " ".join(map(str, problem.args)) if as_json else "not UTF-8"
                raise UserError(f"--text {file}:{block.line + offset}: {detail}; fix the line") from None


def _splits(first: Path, base: Model, new: Sequence[Piece]) -> tuple[tuple[int, ...], ...]:
    """Ids of the old pieces that each new piece splits into."""
    processor = base.processor_of_pieces()
    splits = tuple(tuple(processor.encode(piece.text)) for piece in new)
    strange = [piece.text for piece, split in zip(new, splits, strict=True) if processor.unk_id() in split]
    if strange:
        raise UserError(
            f"{first} has no byte fallback, and {len(strange)} of the new pieces contain characters that it lacks "
            f"({strange[0]!r} is the first): give a first model that was trained with byte_fallback"
        )
    return splits


def _bpe_scores(base: Model, new: Sequence[Piece], splits: Sequence[Sequence[int]]) -> list[float]:
    scores = [np.float32(min(piece.score for piece in base.pieces))]
    for _ in new:
        # LLaMA has runs of spaces at -1e9, where float32 spacing is 64: equal scores would have no order.
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
