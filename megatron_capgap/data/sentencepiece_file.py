"""SentencePiece model files: read piece by piece, and lengthened.

A model file is a protobuf message, and two of those written one after the other read as one: lists are joined, of
single values the later one counts. So whatever is not touched here stays as it was, byte by byte. The message classes
that come with sentencepiece are not used, since each of its versions asks for a protobuf of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_capgap.data.tokenizer import SentencePieceTokenizer

if TYPE_CHECKING:
    import sentencepiece

# Numbers of the fields in sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_KIND, _VOCAB_SIZE = 3, 4
_RULE, _CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_SPACES = 1, 2, 3, 4
# Values of its enumerations.
NORMAL, BYTE = 1, 6
_MODEL_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

Value = int | bytes | float


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int
    """`NORMAL`, `BYTE`, or another number for control, unknown, user-defined and unused ones."""


@dataclass(frozen=True)
class Model:
    """A model file."""

    content: bytes
    kind: str
    """unigram, bpe, word or char."""
    pieces: tuple[Piece, ...]
    """By id."""

    def with_pieces(self, new: Sequence[Piece]) -> Model:
        """The model with more pieces behind its own."""
        pieces = (*self.pieces, *new)
        parts = [self.content, _field(_TRAINER, _field(_VOCAB_SIZE, len(pieces)))]
        for piece in new:
            inner = _field(_TEXT, piece.text.encode()) + _field(_SCORE, piece.score) + _field(_KIND, piece.kind)
            parts.append(_field(_PIECES, inner))
        return Model(b"".join(parts), self.kind, pieces)

    def processor_of_pieces(self) -> sentencepiece.SentencePieceProcessor:
        """Reads text as pieces are written: nothing is normalised, no space is put in front."""
        import sentencepiece

        rules = _field(_RULE, b"identity") + _field(_CHARACTER_MAP, b"")
        rules += _field(_DUMMY_PREFIX, 0) + _field(_REMOVE_SPACES, 0)
        return sentencepiece.SentencePieceProcessor(model_proto=self.content + _field(_NORMALIZER, rules))


def read(path: Path) -> Model:
    """Reads a model file.

    Raises:
        UserError: it is none.
    """
    SentencePieceTokenizer(path)  # sentencepiece's own reader refuses what is damaged
    content = path.read_bytes()
    kind, pieces = 1, []
    for number, value in _fields(content):
        if number == _PIECES:
            pieces.append(_piece(value))
        elif number == _TRAINER:
            kind = dict(_fields(value)).get(_MODEL_KIND, kind)
    return Model(content, _MODEL_KINDS[kind], tuple(pieces))


def _piece(message: bytes) -> Piece:
    inner = dict(_fields(message))
    score = struct.unpack("<f", inner.get(_SCORE, bytes(4)))[0]
    return Piece(inner[_TEXT].decode(), score, inner.get(_KIND, NORMAL))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message, in order; messages within, texts and floats as their bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        length = {1: 8, 5: 4}.get(tag & 7)
        if length is None:
            length, at = _varint(message, at)
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _field(number: int, value: Value) -> bytes:
    """One field as it is written."""
    if isinstance(value, float):
        return _number(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    return _number(number << 3 | 2) + _number(len(value)) + value


def _number(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])
