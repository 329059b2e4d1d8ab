"""Text to token ids and back, from a SentencePiece model file or a Hugging Face tokenizer folder."""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_capgap.config.errors import UserError

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_REMEDY = (
    "give a SentencePiece .model file, a Hugging Face folder with tokenizer.json, "
    "or train one with tools/prepare_data.py --train-tokenizer"
)


class Tokenizer(ABC):
    """A vocabulary with the two ways across it.

    Attributes:
        vocab_size: ids run from 0 to vocab_size - 1, added tokens included.
        bos: id that begins a document, or None.
        eos: id that ends a document, or None.
    """

    vocab_size: int
    bos: int | None
    eos: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no bos or eos is added."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids."""

    @abstractmethod
    def pieces(self) -> list[str | None]:
        """The vocabulary as it is written in its file, by id; None where an id is not used."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id adds to the text: int64 [vocab_size], 0 for control and unknown tokens.

        The space that SentencePiece puts before a text counts, so that a text sums to its bytes or one more.
        """

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the vocabulary: equal where two models' logits mean the same tokens.

        It covers pieces, bos and eos. Merge ranks and scores are left out: they decide how a text is cut, not
        what an id means.
        """
        vocabulary = json.dumps([self.pieces(), self.bos, self.eos], ensure_ascii=True)
        return hashlib.sha256(vocabulary.encode()).hexdigest()


def open_tokenizer(path: str) -> Tokenizer:
    """Open a SentencePiece `.model` file, or a folder with tokenizer.json or tokenizer.model.

    Raises:
        UserError: `path` does not exist or holds no tokenizer.
    """
    place = Path(path)
    if place.is_file():
        if place.name == "tokenizer.json":
            raise UserError(f"tokenizer {path} is one file of a Hugging Face tokenizer: give its folder")
        return SentencePieceTokenizer(place)
    if not place.is_dir():
        raise UserError(f"tokenizer {path} does not exist: {_REMEDY}")
    if (place / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(place)
    if (place / "tokenizer.model").is_file():
        return SentencePieceTokenizer(place / "tokenizer.model")
    raise UserError(f"tokenizer folder {path} has neither tokenizer.json nor tokenizer.model: {_REMEDY}")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; control tokens that stand in a text are read as text."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        model = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            if not model:  # sentencepiece takes an empty model and fails at the first use
                raise RuntimeError("empty file")
            self._processor.load_from_serialized_proto(model)
        except RuntimeError:
            raise UserError(f"tokenizer {path} is not a SentencePiece model: {_REMEDY}") from None
        self.vocab_size = self._processor.get_piece_size()
        self.bos = _id_or_none(self._processor.bos_id())
        self.eos = _id_or_none(self._processor.eos_id())

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

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
    """A Hugging Face tokenizer.json; special tokens that stand in a text become their ids, as they do
    there."""

    def __init__(self, folder: Path) -> None:
        import tokenizers

        file = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {file} cannot be read ({error}): {_REMEDY}") from None
        self._file = file
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        self.bos = self._special(folder, "bos")
        self.eos = self._special(folder, "eos")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

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
        """How this kind of vocabulary writes bytes into pieces."""
        recipe = json.loads(self._file.read_text(encoding="utf-8"))
        steps = set(_types([recipe.get("pre_tokenizer"), recipe.get("decoder")]))
        if "ByteLevel" in steps:
            return len  # each character of a piece stands for one byte
        if _SPACE in json.dumps([recipe.get("decoder"), recipe.get("normalizer")], ensure_ascii=False):
            model = recipe["model"]
            return functools.partial(
                _spaced_length, byte_tokens=bool(model.get("byte_fallback")), unknown=model.get("unk_token")
            )
        raise UserError(
            f"tokenizer {self._file}: bytes per token are known for byte-level and SentencePiece "
            "vocabularies only; use one of these kinds"
        )

    def _special(self, folder: Path, name: str) -> int | None:
        """Id of the bos or eos token, from the first file beside tokenizer.json that names it."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_json(folder / file).get(f"{name}_token")
            content = token.get("content") if isinstance(token, dict) else token
            if content is None:
                continue
            if not isinstance(content, str):
                raise UserError(
                    f"tokenizer {folder / file}: {name}_token {content!r} is no text: save the tokenizer again"
                )
            if content not in self._ids:
                raise UserError(
                    f"tokenizer {folder / file}: {name}_token {content!r} is not in tokenizer.json: "
                    "save both files from one tokenizer"
                )
            return self._ids[content]
        for file in ("generation_config.json", "config.json"):
            token = _read_json(folder / file).get(f"{name}_token_id")
            if isinstance(token, list):
                token = token[0] if token else None
            if token is not None and type(token) is not int:
                raise UserError(f"{folder / file}: {name}_token_id {token!r} is no number: save the model again")
            if token is not None:
                return token
        return None


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _spaced_length(piece: str, byte_tokens: bool = False, unknown: str | None = None) -> int:
    """UTF-8 bytes of a SentencePiece piece."""
    if piece == unknown:
        return 0
    if byte_tokens and len(piece) == 6 and piece.startswith("<0x"):
        return 1
    return len(piece.replace(_SPACE, " ").encode())


def _types(recipe: Any) -> Iterator[str]:
    """Every `type` in the nested description of a tokenizer's steps."""
    if isinstance(recipe, dict):
        if isinstance(recipe.get("type"), str):
            yield recipe["type"]
        recipe = list(recipe.values())
    if isinstance(recipe, list):
        for part in recipe:
            yield from _types(part)


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, or {} where there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer {file} is not valid JSON ({error}): save the tokenizer again") from None
    return content if isinstance(content, dict) else {}
