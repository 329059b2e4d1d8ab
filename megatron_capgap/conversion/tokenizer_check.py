"""Ensures that transformers tokenizes with an exported folder as the tokenizer did in training.

The class with which AutoTokenizer opens a folder depends on the model type, and determines how text is split. The
folder is therefore written to a temporary directory and read back. If the ids differ, tokenizer.json gets the steps of
training, and tokenizer_config.json the class that uses them unchanged.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.conversion.tokenizer_files import FROM_JSON, Words, write
from megatron_capgap.data import tokenizer_folder
from megatron_capgap.data.template_files import Jinja
from megatron_capgap.data.tokenizer_classes import AS_TRAINED
from megatron_capgap.data.tokenizer_folder import LoadedTokenizer

# Texts on which tokenizers differ: leading and trailing spaces, elisions, digits, composed and decomposed letters,
# ligatures, capitals, marks, line ends, scripts, characters outside the basic plane, and a text above any truncation.
_PROBES = (
    "a",
    " ",
    "",
    "hello world",
    "The quick brown fox, 1234 times; jumps!",
    "  two spaces,\ttab\nnew line  ",
    "\n\n  a \n b\r\n\r\n",
    "caf\u00e9 cafe\u0301 x\u0327\u0301 \u01c4 \ufb01 \u00bd \u0130stanbul STRASSE stra\u00dfe",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \uff21\uff11 \ud55c\uad6d \u0939\u093f\u0928\u094d",
    "\U0001f600 \U0001f468\u200d\U0001f469 \u2764\ufe0f",
    "They're DON'T we'LL 12345 3.14 5\u0966\u093e",
    "x=f(a[0])/2 # 'quoted' \"text\" <tag> \u2581x y\u00a0z \u200b\ufeff",
    "the cat sat on the mat " * 1000,
)
_AROUND = 48  # number of first and of last added tokens that are tested
# Settings that tokenizer.json replaces, or that would override it.
_DONE = (
    "tokenizer_class auto_map add_bos_token add_eos_token add_prefix_space added_tokens_decoder legacy from_slow "
    "backend tokenizer_file vocab_file merges_file fix_mistral_regex"
).split()
_SAYING_OTHERWISE = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tekken.json")
_PROGRAM, _CLASS = AS_TRAINED.split(".")
_SOURCE = f'''"""Takes tokenizer.json as it stands, whatever the type of the model beside it."""

from transformers import {FROM_JSON}


class {_CLASS}({FROM_JSON}):
    """Nothing of its own."""
'''


@dataclass(frozen=True)
class AsTrained(Words):
    """Files of another tokenizer, with a tokenizer.json that has the steps of training."""

    base: Words | None = None
    program: bool = False
    """Whether to add custom code (auto_map), with which AutoTokenizer ignores the model type."""

    def write(self, folder: Path) -> None:
        """Writes the files of `base`, then overwrites some of them."""
        assert self.base is not None
        self.base.write(folder)
        settings = {key: value for key, value in tokenizer_folder.settings_of(folder).items() if key not in _DONE}
        settings |= {"tokenizer_class": FROM_JSON}
        settings |= {name: text for name, text in self.special.items() if name in tokenizer_folder.NAMED}
        own = settings.get(tokenizer_folder.OWN) or {}
        if own:  # as text only: tokenizer.json has their matching options
            settings[tokenizer_folder.OWN] = {name: self.special[name] for name in own}
        if self.program:
            settings["auto_map"] = {"AutoTokenizer": [None, AS_TRAINED]}
            (folder / f"{_PROGRAM}.py").write_text(_SOURCE, encoding="utf-8")
        for name in _SAYING_OTHERWISE:
            (folder / name).unlink(missing_ok=True)
        _write_json(folder / "tokenizer_config.json", settings)
        _write_json(folder / "tokenizer.json", _recipe(self.reading))


def settle(files: Mapping[str, Any], words: Words, template: Jinja | None) -> tuple[Words, str | None]:
    """Selects the tokenizer files with which transformers gives the ids of training; returns them and a warning for
    users of the folder, if any.

    Args:
        files: config.json and generation_config.json of the export.
        words: the tokenizer of the model.
        template: the chat template that is written with it.

    Raises:
        UserError: no variant gives the same ids.
    """
    if _apart(files, words, template) is None:
        return words, None
    if _apart(files, found := AsTrained(words.reading, words.ends, words), template) is None:
        return found, None
    found = AsTrained(words.reading, words.ends, words, program=True)
    why = _apart(files, found, template)
    model_type = files["config.json"]["model_type"]
    if why is not None:
        raise UserError(
            f"AutoTokenizer of transformers 5 would not give the ids that this {model_type} was trained with "
            f"({why}): export the checkpoint with a tokenizer that transformers opens as {FROM_JSON}"
        )
    return found, (
        f"AutoTokenizer of transformers 5 opens every {model_type} with the class of that family, which splits text "
        f"differently from the training of this model; auto_map in tokenizer_config.json, with {_PROGRAM}.py, makes it "
        "use tokenizer.json unchanged"
    )


def _apart(files: Mapping[str, Any], words: Words, template: Jinja | None) -> str | None:
    """How the exported folder tokenizes differently from training, or None."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, words, template)
        for file, content in files.items():
            _write_json(folder / file, content)
        try:
            ours = tokenizer_folder.read(folder)
        except UserError as error:
            return in_one_line(str(error))
        whole = (ours.before, ours.after)
        if whole != (words.reading.before, words.reading.after):
            return f"it adds {whole} around a text"
        vocabulary = ours.tokenizer.get_vocab(with_added_tokens=True)
        return _unequal(words.reading, vocabulary, (ours.bos, ours.eos), _encoder(ours)) or _theirs(
            folder, words.reading
        )


def _theirs(folder: Path, meant: LoadedTokenizer) -> str | None:
    """How AutoTokenizer tokenizes differently from training, or None; None without transformers."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    with _quiet():
        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            ends = (found.bos_token_id, found.eos_token_id)
            encode = lambda text, around: found(text, add_special_tokens=around)["input_ids"]  # noqa: E731
            return _unequal(meant, found.get_vocab(), ends, encode)
        except Exception as error:  # any type, for example from a class for another model
            return f"it fails with {in_one_line(str(error))[:120]}"


def _unequal(
    meant: LoadedTokenizer,
    vocabulary: Mapping[str, int],
    ends: tuple[int | None, int | None],
    encode: Callable[[str, bool], list[int]],
) -> str | None:
    expected = meant.tokenizer.get_vocab(with_added_tokens=True)
    if vocabulary != expected:
        return f"its vocabulary has {len(vocabulary)} tokens, or different ones, instead of {len(expected)}"
    for name, found, named, own in zip(("bos", "eos"), ends, meant.named, (meant.bos, meant.eos), strict=True):
        if found not in (named, own):
            return f"its {name} is {found} instead of {own}"
    own_encode = _encoder(meant)
    for text in (*_PROBES, *_with_added(meant)):
        for around in (False, True):
            if encode(text, around) != own_encode(text, around):
                return f"it splits {text[:40]!r} differently"
    return None


def _encoder(reading: LoadedTokenizer) -> Callable[[str, bool], list[int]]:
    def encode(text: str, around: bool) -> list[int]:
        ids = reading.tokenizer.encode(text, add_special_tokens=False).ids
        return [*reading.before, *ids, *reading.after] if around else ids

    return encode


def _with_added(reading: LoadedTokenizer) -> Iterator[str]:
    """Yields texts that contain added tokens."""
    added = [token.content for _, token in sorted(reading.tokenizer.get_added_tokens_decoder().items())]
    some = dict.fromkeys([*reading.special.values(), *added[:_AROUND], *added[-_AROUND:]])
    for token in some:
        yield f"a{token}b {token} c\n{token}"


def _recipe(reading: LoadedTokenizer) -> dict[str, Any]:
    """Content of tokenizer.json, with the ids that are added before and after a text."""
    recipe = json.loads(reading.tokenizer.to_str())
    if reading.tokenizer.encode("a", add_special_tokens=True).ids != _encoder(reading)("a", True):
        tokens = {str(reading.tokenizer.id_to_token(i)): i for i in (*reading.before, *reading.after)}
        text_of = {number: text for text, number in tokens.items()}

        def part(sequence: str, number: int) -> list[dict[str, Any]]:
            before, after = (
                [{"SpecialToken": {"id": text_of[i], "type_id": number}} for i in ids]
                for ids in (reading.before, reading.after)
            )
            return [*before, {"Sequence": {"id": sequence, "type_id": number}}, *after]

        recipe["post_processor"] = {
            "type": "TemplateProcessing",
            "single": part("A", 0),
            "pair": [*part("A", 0), *part("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in tokens.items()},
        }
    return recipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses messages of transformers about the temporary folder."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
