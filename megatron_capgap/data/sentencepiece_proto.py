"""Reads SentencePiece model files and appends pieces to them.

A model file is a protobuf message. Concatenated messages parse as one: repeated fields are joined, and the last value
of a singular field counts. Appending therefore leaves the original bytes unchanged. The message classes of
sentencepiece are not used, because each of its versions requires a specific protobuf version.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_capgap.common.errors import UserError

if TYPE_CHECKING:
    import sentencepiece

REMEDY = (
    "give a SentencePiece .model file, a Hugging Face folder with tokenizer.json, "
    "or train one with tools/prepare_data.py --train-tokenizer"
)
# Numbers of the fields in sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_KIND, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_SPECIAL = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2)}  # (field number, default id)
_RULE, _CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5
# Enum values.
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
_MODEL_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

Value = int | bytes | float


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int
    """`NORMAL`, `BYTE`, `CONTROL`, `USER_DEFINED`, or another number for unknown and unused pieces."""


@dataclass(frozen=True)
class Model:
    """A parsed model file."""

    content: bytes
    kind: str
    """unigram, bpe, word or char."""
    pieces: tuple[Piece, ...]
    """Pieces by id."""
    special: dict[str, int] = field(default_factory=dict)
    """Ids of unk_token, bos_token and eos_token, as far as the model has them."""
    byte_fallback: bool = False
    """Whether a character without a piece is encoded as byte pieces."""
    character_map: bytes = b""
    """Compiled normalisation rules; empty if text is not normalised."""
    adds_prefix: bool = True
    """Whether a space is added before a text."""
    removes_spaces: bool = True
    """Whether leading, trailing and repeated spaces are removed."""
    escapes_spaces: bool = True
    """Whether a space is written as U+2581."""

    def with_pieces(self, new: Sequence[Piece]) -> Model:
        """The model with pieces appended."""
        pieces = (*self.pieces, *new)
        parts = [self.content, _field(_TRAINER, _field(_VOCAB_SIZE, len(pieces)))]
        for piece in new:
            inner = _field(_TEXT, piece.text.encode()) + _field(_SCORE, piece.score) + _field(_KIND, piece.kind)
            parts.append(_field(_PIECES, inner))
        return replace(self, content=b"".join(parts), pieces=pieces)

    def processor_of_pieces(self) -> sentencepiece.SentencePieceProcessor:
        """A processor that encodes text literally: no normalisation, no space added in front."""
        import sentencepiece

        rules = _field(_RULE, b"identity") + _field(_CHARACTER_MAP, b"")
        rules += _field(_DUMMY_PREFIX, 0) + _field(_REMOVE_SPACES, 0)
        return sentencepiece.SentencePieceProcessor(model_proto=self.content + _field(_NORMALIZER, rules))


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Opens a model file.

    Raises:
        UserError: the file is not a SentencePiece model.
    """
    import sentencepiece

    model, processor = path.read_bytes(), sentencepiece.SentencePieceProcessor()
    try:
        if not model:  # sentencepiece loads an empty model and fails at the first use
            raise RuntimeError("empty file")
        processor.load_from_serialized_proto(model)
    except RuntimeError:
        raise UserError(f"tokenizer {path} is not a SentencePiece model: {REMEDY}") from None
    return processor


def read(path: Path) -> Model:
    """Reads a model file.

    Raises:
        UserError: the file is not a SentencePiece model.
    """
    load(path)  # sentencepiece's own parser rejects damaged files
    content = path.read_bytes()
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    pieces = []
    for number, value in _fields(content):
        if number == _PIECES:
            pieces.append(_piece(_bytes(value)))
        elif number == _TRAINER:
            trainer.update(_fields(_bytes(value)))
        elif number == _NORMALIZER:
            normalizer.update(_fields(_bytes(value)))
    special = {name: _signed(trainer.get(number, unless)) for name, (number, unless) in _SPECIAL.items()}
    return Model(
        content,
        _MODEL_KINDS[_int(trainer.get(_MODEL_KIND, 1))],
        tuple(pieces),
        {name: number for name, number in special.items() if 0 <= number < len(pieces)},
        bool(trainer.get(_BYTE_FALLBACK, 0)),
        bytes(normalizer.get(_CHARACTER_MAP, b"")),
        bool(normalizer.get(_DUMMY_PREFIX, 1)),
        bool(normalizer.get(_REMOVE_SPACES, 1)),
        bool(normalizer.get(_ESCAPE_SPACES, 1)),
    )


def _signed(value: int | bytes) -> int:
    """Decodes a signed integer, which is stored as 64 bits if negative."""
    number = _int(value)
    return number - (1 << 64) if number >> 63 else number


def _int(value: int | bytes) -> int:
    assert isinstance(value, int), "sentencepiece has read the file, and this field is an integer"
    return value


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes), "sentencepiece has read the file, and this field is not an integer"
    return value


def _piece(message: bytes) -> Piece:
    inner = dict(_fields(message))
    score = struct.unpack("<f", _bytes(inner.get(_SCORE, bytes(4))))[0]
    return Piece(_bytes(inner[_TEXT]).decode(), score, _int(inner.get(_KIND, NORMAL)))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields number and value of each field of a message, in order; nested messages, strings and floats as bytes."""
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
    """Decodes a varint (groups of 7 bits, lowest first); returns it and the position after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _field(number: int, value: Value) -> bytes:
    """Encodes one field."""
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
