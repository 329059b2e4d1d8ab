"""Text to token ids and back, from a SentencePiece model file or a Hugging Face tokenizer folder."""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_capgap.common.errors import UserError
from megatron_capgap.data import sentencepiece_proto, tokenizer_folder
from megatron_capgap.data.sentencepiece_proto import CONTROL, REMEDY, USER_DEFINED
from megatron_capgap.data.tokenizer_folder import SAVE
from megatron_capgap.data.tokenizer_steps import SPACE

if TYPE_CHECKING:
    import tokenizers

# Vocabulary files that transformers reads with their tokenizer class.
_PARTS = ("vocab.json", "merges.txt")
_OTHER_FORMS = (*_PARTS, "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


class Tokenizer(ABC):
    """Converts text to token ids and back.

    Attributes:
        vocab_size: ids run from 0 to vocab_size - 1, added tokens included.
        bos: id that begins a document, or None.
        eos: id that ends a document, or None.
    """

    vocab_size: int
    bos: int | None
    eos: int | None
    stops: frozenset[int]
    """Stop ids: `eos`, and those in generation_config.json beside the tokenizer."""
    special: dict[str, str]
    """Text of bos_token, eos_token and other named special tokens, for chat templates."""
    whole: frozenset[int]
    """Ids of never-split tokens: control tokens, added tokens, user-defined pieces of a SentencePiece model."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    """Ids that the tokenizer adds before and after a text by default, as in transformers."""
    remarks: tuple[str, ...] = ()
    """Warnings from loading, one line each."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without truncation, padding or added special tokens."""

    @abstractmethod
    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text that contains special tokens as text, as chat templates write them; returns the ids, and for
        each id its span (start, end) in the text."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids."""

    @abstractmethod
    def pieces(self) -> list[str | None]:
        """Vocabulary entries by id, as in the vocabulary file; None for unused ids."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id adds to the text: int64 [vocab_size], 0 for control and unknown tokens.

        The space that SentencePiece adds before a text counts, so the sum is the text's bytes or one more.
        """

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of pieces, bos and eos: equal if the logits of two models refer to the same tokens.

        Merge ranks and scores are excluded: they determine how text is split, not what an id means.
        """
        return self._digest(self.bos, self.eos)

    def special_ids_of(self, fingerprint: str) -> tuple[int | None, int | None] | None:
        """bos and eos of the tokenizer with a fingerprint if it has the same pieces as this one; else None.

        A base model and its instruct model usually have the same pieces and different eos ids.
        """
        if fingerprint == self.fingerprint:
            return self.bos, self.eos
        ids = [None, *sorted({*self.whole, *range(min(4, self.vocab_size))})]
        return next(((bos, eos) for bos in ids for eos in ids if self._digest(bos, eos) == fingerprint), None)

    def _digest(self, bos: int | None, eos: int | None) -> str:
        digest = self._pieces_digest.copy()  # hash of [pieces, bos, eos] as JSON
        digest.update(f", {json.dumps(bos)}, {json.dumps(eos)}]".encode())
        return digest.hexdigest()

    @functools.cached_property
    def _pieces_digest(self) -> "hashlib._Hash":
        return hashlib.sha256(f"[{json.dumps(self.pieces(), ensure_ascii=True)}".encode())


def open_tokenizer(path: str) -> Tokenizer:
    """Opens a SentencePiece `.model` file, or a folder with tokenizer.json, tokenizer.model, or vocab.json and
    merges.txt.

    Raises:
        UserError: `path` does not exist or has no tokenizer.
    """
    place = Path(path)
    if place.is_file():
        if place.name == "tokenizer.json":
            raise UserError(f"tokenizer {path} is one file of a Hugging Face tokenizer: give its folder")
        return SentencePieceTokenizer(place)
    if not place.is_dir():
        raise UserError(f"tokenizer {path} does not exist: {REMEDY}")
    others = [name for name in _OTHER_FORMS if (place / name).is_file()]
    if others[:2] == [*_PARTS] or any((place / name).is_file() for name in tokenizer_folder.FORMS[:2]):
        return HuggingFaceTokenizer(place)
    if len(others) == 1 and others[0] in _PARTS:
        missing = next(name for name in _PARTS if name not in others)
        raise UserError(
            f"tokenizer folder {path} has {others[0]} without {missing}: copy that file there too, or {SAVE}"
        )
    if others:
        raise UserError(
            f"tokenizer folder {path} has {', '.join(others)}, which are not supported, and neither tokenizer.json nor "
            f"tokenizer.model: {SAVE}, and name PreTrainedTokenizerFast as tokenizer_class there"
        )
    raise UserError(f"tokenizer folder {path} has neither tokenizer.json nor tokenizer.model: {REMEDY}")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; control tokens in a text are encoded as plain text."""

    def __init__(self, path: Path) -> None:
        self._processor = sentencepiece_proto.load(path)
        self.vocab_size = self._processor.get_piece_size()
        self.bos = _id_or_none(self._processor.bos_id())
        self.eos = _id_or_none(self._processor.eos_id())
        self.stops = frozenset() if self.eos is None else frozenset({self.eos})
        names = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": _id_or_none(self._processor.unk_id())}
        self.special = {name: self._processor.id_to_piece(i) for name, i in names.items() if i is not None}
        self._path = path

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._as_exported.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    @functools.cached_property
    def whole(self) -> frozenset[int]:  # type: ignore[override]
        pieces = sentencepiece_proto.read(self._path).pieces
        return frozenset(number for number, piece in enumerate(pieces) if piece.kind in (CONTROL, USER_DEFINED))

    @functools.cached_property
    def _as_exported(self) -> "tokenizers.Tokenizer":
        """The model as transformers reads it."""
        return tokenizer_folder.read_model(self._path).tokenizer

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str | None]:
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def byte_lengths(self) -> np.ndarray:
        return np.array([self._byte_length(i) for i in range(self.vocab_size)], dtype=np.int64)

    def _byte_length(self, token: int) -> int:
        sp = self._processor
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            return 0
        return 1 if sp.is_byte(token) else _spaced_length(sp.id_to_piece(token))


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face folder; special tokens in a text become their ids, as in transformers."""

    def __init__(self, folder: Path) -> None:
        found = tokenizer_folder.read(folder)
        self._folder, self._tokenizer = folder, found.tokenizer
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        self.bos, self.eos, self.stops = found.bos, found.eos, found.stops
        self.before, self.after, self.special = found.before, found.after, found.special
        self.remarks = found.remarks
        self.whole = found.own | frozenset(self._tokenizer.get_added_tokens_decoder())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self) -> list[str | None]:
        pieces: list[str | None] = [None] * self.vocab_size
        for piece, token in self._ids.items():
            pieces[token] = piece
        return pieces

    def byte_lengths(self) -> np.ndarray:
        length_of = self._piece_length()
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, token in self._ids.items():
            lengths[token] = length_of(piece)
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[token] = 0 if added.special else len(added.content.encode())
        return lengths

    def _piece_length(self) -> Callable[[str], int]:
        """Returns the function from a piece to its number of UTF-8 bytes for this kind of vocabulary."""
        recipe = json.loads(self._tokenizer.to_str())
        steps = set(tokenizer_folder.types_of([recipe.get("pre_tokenizer"), recipe.get("decoder")]))
        if "ByteLevel" in steps:
            return len  # each character of a piece stands for one byte
        if SPACE in json.dumps([recipe.get("decoder"), recipe.get("normalizer")], ensure_ascii=False):
            model = recipe["model"]
            unknown = model.get("unk_token")
            if model.get("unk_id") is not None:  # a unigram model
                unknown = model["vocab"][model["unk_id"]][0]
            return functools.partial(_spaced_length, byte_tokens=bool(model.get("byte_fallback")), unknown=unknown)
        raise UserError(
            f"tokenizer {self._folder}: bytes per token are supported for byte-level and SentencePiece "
            "vocabularies only; use one of these kinds"
        )


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _spaced_length(piece: str, byte_tokens: bool = False, unknown: str | None = None) -> int:
    """UTF-8 bytes of a SentencePiece piece."""
    if piece == unknown:
        return 0
    if byte_tokens and len(piece) == 6 and piece.startswith("<0x"):
        return 1
    return len(piece.replace(SPACE, " ").encode())
