"""The tokenizer of an exported model: files that came along, or a SentencePiece model as transformers reads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from megatron_capgap.checkpoint.manifest import Manifest
from megatron_capgap.config.errors import UserError
from megatron_capgap.conversion.importing import TOKENIZER_FILES, copy_files
from megatron_capgap.data import tokenizer_folder
from megatron_capgap.data.chat import template_ends
from megatron_capgap.data.template_files import TEMPLATES, Jinja
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer

_JSON = "tokenizer.json"
_PROBES = (
    "The quick brown fox, 1234 times; jumps!",
    "  two spaces,\ttab\nnew line  ",
    "caf\u00e9 na\u00efve \u4e2d\u6587 \u65e5\u672c \U0001f600",
    "x=f(a[0])/2 # 'quoted' \"text\"",
    " ",
)

# Where the steps of the classes part: elisions, digits, letters in two characters, marks, ends of lines.
_OF_STEPS = (*_PROBES, "They're DON'T 12345 e\u0301 x\u0327\u0301 5\u0966\u093e\r\n\n  y\u00a0z", "a", "hello world")


class Words(Protocol):
    """A tokenizer that can be written into a Hugging Face folder."""

    bos_token_id: int | None
    eos_token_id: int | None
    ends: frozenset[int]
    """Ids that end a text: what the tokenizer and the model that it came with say, and the chat template writes."""

    special: dict[str, str]
    """Text of bos_token, eos_token and the like."""

    def write(self, folder: Path) -> None:
        """Writes its files."""


@dataclass(frozen=True)
class Copied:
    """Files of a Hugging Face folder."""

    folder: Path
    bos_token_id: int | None
    eos_token_id: int | None
    ends: frozenset[int] = frozenset()
    special: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Copies those that are there."""
        copy_files(self.folder, folder, TOKENIZER_FILES)


@dataclass(frozen=True)
class Translated:
    """A SentencePiece model with the tokenizer.json made of it."""

    model: Path
    tokenizer_json: str
    settings: dict[str, Any]
    bos_token_id: int | None
    eos_token_id: int | None
    ends: frozenset[int]
    special: dict[str, str]

    def write(self, folder: Path) -> None:
        """Both forms of the vocabulary, and the special tokens."""
        (folder / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(self.model, folder / "tokenizer.model")


def find(carried: Path | None, manifest: Manifest) -> Words:
    """The tokenizer that a checkpoint speaks.

    Args:
        carried: folder with the files that came along, or None.
        manifest: says which tokenizer the model was trained with.

    Raises:
        UserError: it is not there, is another one by now, or cannot be said in transformers' words.
    """
    place = str(carried) if carried else manifest.tokenizer
    opened = open_tokenizer(place)
    if opened.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"{place}: is not the tokenizer that the checkpoint was trained with; put that one there")
    # Files that transformers reads itself go out as they came in.
    known = carried is not None and any((carried / name).is_file() for name in ("tokenizer_config.json", _JSON))
    ends = opened.stops | template_ends(manifest.chat_template, opened)
    if not known and not (Path(place) / _JSON).is_file():
        model = Path(place) / "tokenizer.model" if Path(place).is_dir() else Path(place)
        return translate(model, opened, ends)
    return Copied(Path(place), opened.bos, opened.eos, ends, opened.special)


def caution(config: dict[str, Any], words: Words) -> str | None:
    """What whoever loads the folder must know to read the right ids: which class transformers opens a tokenizer with
    depends on the model beside it.

    Args:
        config: config.json of the export.
        words: the tokenizer that the model speaks.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        words.write(folder)
        meant = tokenizer_folder.read(words.folder if isinstance(words, Copied) else folder)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            found = tokenizer_folder.read(folder)
        except UserError as error:
            return f"AutoTokenizer of transformers 5 reads other ids than this model speaks: {error}"
    if all(_ids(found, text) == _ids(meant, text) for text in _OF_STEPS):
        return None
    return (
        f"AutoTokenizer of transformers 5 opens the tokenizer of this {config['model_type']} as "
        f"{found.made_by or 'PreTrainedTokenizerFast'}, and reads other ids with this vocabulary; load it with "
        f"{meant.made_by or 'PreTrainedTokenizerFast'}.from_pretrained"
    )


def _ids(reading: tokenizer_folder.Reading, text: str) -> list[int]:
    return reading.tokenizer.encode(text, add_special_tokens=False).ids


def write_template(folder: Path, template: Jinja, words: Words) -> None:
    """Puts the chat templates that a model was finetuned with in the place of any that came with its tokenizer.

    Args:
        folder: with the tokenizer's files.
        template: may speak of bos_token and eos_token.
        words: what wrote them.
    """
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
    reading = tokenizer_folder.read_model(model)
    for text in _PROBES:
        if reading.tokenizer.encode(text, add_special_tokens=False).ids != opened.encode(text):
            raise UserError(
                f"{model}: this kind of SentencePiece model has no equal in tokenizer.json (they differ on {text!r}); "
                "train with a BPE model, as tools/prepare_data.py --train-tokenizer makes one"
            )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **reading.special}
    return Translated(model, reading.tokenizer.to_str(), settings, opened.bos, opened.eos, ends, opened.special)
