"""The tokenizer of an exported model: files that came along, or a SentencePiece model as transformers reads it."""

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
from megatron_capgap.data.tokenizer_folder import Reading

FROM_JSON = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it stands."""
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

    reading: Reading
    """How it was read when the model was trained."""
    ends: frozenset[int] = frozenset()
    """Ids that end a text: what the tokenizer and the model that it came with say, and the chat template writes."""

    @property
    def bos_token_id(self) -> int | None:
        """Begins a document."""
        return self.reading.bos

    @property
    def eos_token_id(self) -> int | None:
        """Ends a document."""
        return self.reading.eos

    @property
    def special(self) -> dict[str, str]:
        """Text of bos_token, eos_token and the like."""
        return self.reading.special

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Writes its files."""


@dataclass(frozen=True)
class Copied(Words):
    """Files of a Hugging Face folder."""

    folder: Path = Path()

    def write(self, folder: Path) -> None:
        """Copies those that are there; not the name of a program, which stays behind."""
        copy_files(self.folder, folder, TOKENIZER_FILES)
        file = folder / "tokenizer_config.json"
        settings = tokenizer_folder.read_json(file)
        if settings.pop("auto_map", None):
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Translated(Words):
    """A SentencePiece model with the tokenizer.json made of it."""

    model: Path = Path()

    @property
    def tokenizer_json(self) -> str:
        return self.reading.tokenizer.to_str()

    def write(self, folder: Path) -> None:
        """Both forms of the vocabulary, and the special tokens."""
        (folder / _JSON).write_text(self.tokenizer_json, encoding="utf-8")
        settings = {"tokenizer_class": FROM_JSON, "clean_up_tokenization_spaces": False, **self.special}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(self.model, folder / "tokenizer.model")


def find(carried: Path | None, meta: CheckpointMetadata) -> tuple[Words, str | None]:
    """The tokenizer that a checkpoint speaks, and a line about ids that end no text of its.

    Args:
        carried: folder with the files that came along, or None.
        meta: says which tokenizer the model was trained with.

    Raises:
        UserError: it is not there, is another one by now, or cannot be said in transformers' words.
    """
    place = str(carried) if carried else meta.tokenizer
    opened = open_tokenizer(place)
    if opened.fingerprint != meta.tokenizer_fingerprint:
        raise UserError(f"{place}: is not the tokenizer that the checkpoint was trained with; put that one there")
    # Files that transformers reads itself go out as they came in.
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
        folder: where.
        words: the tokenizer.
        template: the chat templates that the model was finetuned with, or None; they come in the place of any that came
            with the tokenizer, and may speak of bos_token and eos_token.
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
    """A SentencePiece model as a tokenizer.json that gives the same ids.

    Raises:
        UserError: it is of another kind, seen by the ids it gives to a few texts.
    """
    if sentencepiece_proto.read(model).kind not in ("bpe", "unigram"):
        raise UserError(
            f"{model}: a SentencePiece model of words or characters has no equal in tokenizer.json, and transformers "
            "cannot read the model; train with a BPE model, as tools/prepare_data.py --train-tokenizer makes one"
        )
    reading = tokenizer_folder.read_model(model)
    for text in _PROBES:
        if reading.tokenizer.encode(text, add_special_tokens=False).ids != opened.encode(text):
            raise UserError(
                f"{model}: this kind of SentencePiece model has no equal in tokenizer.json (they differ on {text!r}); "
                "train with a BPE model, as tools/prepare_data.py --train-tokenizer makes one"
            )
    return Translated(reading, ends, model)
