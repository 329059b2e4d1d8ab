"""Tokenizer files of an exported model: copied original files, or a converted SentencePiece model."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.common.errors import UserError
from megatron_capgap.conversion.importing import TOKENIZER_FILES, copy_files
from megatron_capgap.data import sentencepiece_proto, tokenizer_folder
from megatron_capgap.data.chat_template import stop_tokens
from megatron_capgap.data.template_files import TEMPLATES, Jinja
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer
from megatron_capgap.data.tokenizer_folder import LoadedTokenizer

FROM_JSON = "PreTrainedTokenizerFast"
"""The transformers class that uses tokenizer.json unchanged."""
_JSON = "tokenizer.json"
_PROBES = (
    "The quick brown fox, 1234 times; jumps!",
    "  two spaces,\ttab\nnew line  ",
    "caf\u00e9 na\u00efve \u4e2d\u6587 \u65e5\u672c \U0001f600",
    "x=f(a[0])/2 # 'quoted' \"text\"",
    " ",
)


@dataclass(frozen=True)
class Words(ABC):
    """A tokenizer that can be written into a Hugging Face folder."""

    reading: LoadedTokenizer
    """The tokenizer as it was read in training."""
    ends: frozenset[int] = frozenset()
    """Stop ids: of the tokenizer, of the original model's config files, and of the chat template."""

    @property
    def bos_token_id(self) -> int | None:
        """Id that begins a document."""
        return self.reading.bos

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends a document."""
        return self.reading.eos

    @property
    def special(self) -> dict[str, str]:
        """Text of bos_token, eos_token and other named special tokens."""
        return self.reading.special

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Writes the tokenizer files."""


@dataclass(frozen=True)
class Copied(Words):
    """Files of a Hugging Face folder."""

    folder: Path = Path()

    def write(self, folder: Path) -> None:
        """Copies the files that exist; removes auto_map, since custom code is not copied."""
        copy_files(self.folder, folder, TOKENIZER_FILES)
        file = folder / "tokenizer_config.json"
        settings = tokenizer_folder.read_json(file)
        if settings.pop("auto_map", None):
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Translated(Words):
    """A SentencePiece model with its converted tokenizer.json."""

    model: Path = Path()

    @property
    def tokenizer_json(self) -> str:
        return self.reading.tokenizer.to_str()

    def write(self, folder: Path) -> None:
        """Writes both forms of the vocabulary, and the special tokens."""
        (folder / _JSON).write_text(self.tokenizer_json, encoding="utf-8")
        settings = {"tokenizer_class": FROM_JSON, "clean_up_tokenization_spaces": False, **self.special}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(self.model, folder / "tokenizer.model")


def find(carried: Path | None, meta: CheckpointMetadata) -> tuple[Words, str | None]:
    """The tokenizer of a checkpoint, and a message about dropped stop ids, if any.

    Args:
        carried: folder of the original Hugging Face files, or None.
        meta: the checkpoint's metadata, which names the tokenizer.

    Raises:
        UserError: the tokenizer is missing, has changed, or has no equivalent in transformers.
    """
    place = str(carried) if carried else meta.tokenizer
    opened = open_tokenizer(place)
    if opened.fingerprint != meta.tokenizer_fingerprint:
        raise UserError(f"{place}: is not the tokenizer that the checkpoint was trained with; restore that one")
    # Files that transformers itself reads are copied unchanged.
    known = carried is not None and any((carried / name).is_file() for name in ("tokenizer_config.json", _JSON))
    known = known or not (Path(place) / "tokenizer.model").is_file()
    ends, warning = stop_tokens(opened, meta.chat_template, meta.model.vocab)
    if not Path(place).is_dir():
        return translate(Path(place), opened, ends), warning
    reading = tokenizer_folder.read(Path(place))
    if not known and not (Path(place) / _JSON).is_file():
        return Translated(reading, ends, Path(place) / "tokenizer.model"), warning
    return Copied(reading, ends, Path(place)), warning


def write(folder: Path, words: Words, template: Jinja | None) -> None:
    """Writes a tokenizer.

    Args:
        folder: output folder.
        words: the tokenizer.
        template: the chat templates that the model was finetuned with, or None; they replace the tokenizer's own, and
            may refer to bos_token and eos_token.
    """
    words.write(folder)
    if template is None:
        return
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings.pop("chat_template", None)
    for name in ("bos_token", "eos_token"):
        if name in words.special and settings.get(name) is None:
            settings[name] = words.special[name]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    for name, text in ({"default": template} if isinstance(template, str) else template).items():
        place = folder / "chat_template.jinja" if name == "default" else folder / TEMPLATES / f"{name}.jinja"
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")


def translate(model: Path, opened: Tokenizer, ends: frozenset[int] = frozenset()) -> Translated:
    """Converts a SentencePiece model to a tokenizer.json that gives the same ids.

    Raises:
        UserError: the kind of model is not supported, or the ids of a few test texts differ.
    """
    if sentencepiece_proto.read(model).kind not in ("bpe", "unigram"):
        raise UserError(
            f"{model}: a SentencePiece model of words or characters has no equivalent in tokenizer.json, and "
            "transformers cannot read it; train with a BPE model, as tools/prepare_data.py --train-tokenizer makes one"
        )
    reading = tokenizer_folder.read_model(model)
    for text in _PROBES:
        if reading.tokenizer.encode(text, add_special_tokens=False).ids != opened.encode(text):
            raise UserError(
                f"{model}: this kind of SentencePiece model has no equivalent in tokenizer.json (ids differ on "
                f"{text!r}); train with a BPE model, as tools/prepare_data.py --train-tokenizer makes one"
            )
    return Translated(reading, ends, model)
