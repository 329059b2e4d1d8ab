"""Reads a Hugging Face tokenizer folder as transformers' AutoTokenizer does.

Other files add tokens to tokenizer.json, a class can replace its steps, and some folders have only a SentencePiece
model. Follows transformers 5 (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend`); tests compare the ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.data import mistral_regex, sentencepiece_proto
from megatron_capgap.data.sentencepiece_proto import CONTROL, USER_DEFINED
from megatron_capgap.data.tokenizer_classes import class_of, program_of
from megatron_capgap.data.tokenizer_steps import OF_PARTS, SPECIAL, of_class, of_sentencepiece

if TYPE_CHECKING:
    import tokenizers

SAVE = "save it with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER), without config.json"
"""Fix that creates a tokenizer.json with the steps of a class."""
FORMS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Vocabulary files, in order of precedence; the merges of vocab.json are in merges.txt."""
OWN = "model_specific_special_tokens"
_GENERATION = "generation_config.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class LoadedTokenizer:
    """Content of a tokenizer folder."""

    tokenizer: tokenizers.Tokenizer
    """Splits text, without truncation or padding."""
    bos: int | None
    eos: int | None
    """bos and eos of the folder."""
    stops: frozenset[int]
    """Stop ids: `eos`, and those in generation_config.json."""
    before: tuple[int, ...]
    after: tuple[int, ...]
    """Ids that transformers adds before and after a text by default."""
    special: dict[str, str]
    """Text of the named special tokens, such as bos_token."""
    named: tuple[int | None, int | None] = (None, None)
    """bos and eos of the tokenizer itself, ignoring the model's config files."""
    own: frozenset[int] = frozenset()
    """Ids of the user-defined pieces of a SentencePiece model, which are never split."""
    made_by: str | None = None
    """The transformers class whose steps replace those of tokenizer.json; None if tokenizer.json is used unchanged."""
    remarks: tuple[str, ...] = ()
    """Warnings from reading."""


def read_model(file: Path) -> LoadedTokenizer:
    """Reads a SentencePiece model like a folder that contains only this file.

    Raises:
        UserError: the file is not a SentencePiece model.
    """
    return _load(file.parent, file, {}, legacy=True, beside=False)


def read(folder: Path) -> LoadedTokenizer:
    """Reads a folder with one of `FORMS`.

    Raises:
        UserError: a file is damaged, or contradicts another.
    """
    settings = settings_of(folder)
    legacy = "added_tokens_decoder" not in settings  # written before transformers 4.34
    form = next(name for name in FORMS if (folder / name).is_file())
    return _load(folder, folder / form, settings, legacy)


def settings_of(folder: Path) -> dict[str, Any]:
    """Reads tokenizer_config.json, merged with special_tokens_map.json if it has no added_tokens_decoder.

    Unnamed special tokens are normalised to the list `extra_special_tokens`, and model-specific named ones, such as
    image_token, to the dict `model_specific_special_tokens`, wherever the files have them.
    """
    found = read_json(folder / "tokenizer_config.json")
    special = {} if "added_tokens_decoder" in found else read_json(folder / "special_tokens_map.json")
    extra, additional = "extra_special_tokens", "additional_special_tokens"
    if additional in found and not found.get(extra):
        found[extra] = found.pop(additional)
    own = _taken(found, lambda value: isinstance(value, str))
    if isinstance(found.get(extra), dict):
        own |= found.pop(extra)
    if own:
        found[OWN] = own
    if isinstance(special.get(extra), list):
        there = list(found.get(extra) or [])
        special[extra] = [*there, *(token for token in special[extra] if token not in there)]
    found |= special
    if isinstance(found.get(extra), dict):
        found[OWN] = {**(found.get(OWN) or {}), **found.pop(extra)}
    if additional in found and extra not in found:
        found[extra] = found.pop(additional)
    own = {**_taken(found, lambda value: isinstance(_content(value), str)), **(found.pop(OWN, None) or {})}
    if not isinstance(found.get(extra) or [], list):
        raise UserError(
            f"tokenizer {folder / 'tokenizer_config.json'}: {extra} {found[extra]!r} is not a list of tokens: save the "
            "tokenizer again"
        )
    return {**found, OWN: own} if own else found


def _taken(settings: dict[str, Any], is_token: Callable[[Any], bool]) -> dict[str, Any]:
    """Removes the model-specific named tokens from the settings and returns them."""
    names = [key for key, value in settings.items() if key not in NAMED and key.endswith("_token") and is_token(value)]
    return {name: settings.pop(name) for name in names}


def _load(folder: Path, file: Path, settings: dict[str, Any], legacy: bool, beside: bool = True) -> LoadedTokenizer:
    """Reads a vocabulary file with its settings.

    Args:
        folder: folder of the other files, which are read if `beside`.
        file: tokenizer.json, a SentencePiece model, or vocab.json.
        settings: content of tokenizer_config.json.
        legacy: whether the settings have no added_tokens_decoder.
    """
    for key in NAMED:
        content = _content(settings.get(key))
        if content is not None and not isinstance(content, str):
            where = folder / "tokenizer_config.json"
            raise UserError(f"tokenizer {where}: {key} {content!r} is not a string: save the tokenizer again")
    made_by = _class_of(folder, settings) if beside else None
    has_json, user_defined = file.name == FORMS[0], frozenset[int]()
    in_file, settings = settings, {**SPECIAL.get(made_by or "", {}), **settings}
    try:
        if has_json:
            built, listed, padding = _from_json(file, settings, made_by)
            settings = {**padding, **settings}
        elif file.name == FORMS[2]:
            built, listed = _from_vocabulary(file, settings, made_by), []
        else:
            model = sentencepiece_proto.read(file)
            built, listed = of_sentencepiece(model, file, settings, made_by), []
            user_defined = frozenset(i for i, piece in enumerate(model.pieces) if piece.kind == USER_DEFINED)
            defaults = {key: model.pieces[number].text for key, number in model.special.items()}
            own = [p for p in model.pieces if p.kind == CONTROL or (p.kind == USER_DEFINED and made_by)]
            extra = [{"content": p.text, "normalized": False, "special": p.kind == CONTROL} for p in own]
            settings = {**settings, "extra_special_tokens": [*_extra(settings), *extra]}
            settings = settings if made_by else {**defaults, **settings}
        built.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        added = _added_tokens(read_json(folder / "added_tokens.json") if beside else {}, in_file, legacy, listed)
        if not (has_json or made_by):
            added = {number: _unnormalized(token) for number, token in added.items()}
        _add(built, settings, added)
        remarks = _remarks(folder, settings, built) if beside else ()
        before, after = _around(built, settings, has_json)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(
            f"tokenizer {file} cannot be read ({in_one_line(error)}): save the tokenizer again, give a "
            "SentencePiece .model file, or train one with tools/prepare_data.py --train-tokenizer"
        ) from None
    of_model = {name: _of_model(folder, name) if beside else [] for name in ("bos", "eos")}
    named = _named(built, settings, "bos"), _named(built, settings, "eos")
    bos, eos = (  # if the tokenizer names none, use the model's
        own if own is not None else next((token for token in ids if token >= 0), None)
        for own, ids in zip(named, of_model.values(), strict=True)
    )
    special = {key: _content(token) for key, token in _roles(settings).items()}
    for name, token in (("bos_token", bos), ("eos_token", eos)):  # from the model alone, for chat templates
        if token is not None and name not in special and (text := built.id_to_token(token)):
            special[name] = text
            built.add_special_tokens([text])
    stops = {*([] if eos is None else [eos]), *(_stops_of_model(folder) if beside else [])}
    ends = (bos, eos, frozenset(stops))
    return LoadedTokenizer(built, *ends, before, after, special, named, user_defined, made_by, remarks)


def _class_of(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The transformers class that applies its own steps to the folder's vocabulary and merges, or None."""
    file = folder / "tokenizer.json"
    config = read_json(folder / "config.json")
    name = class_of(settings, config, lambda: file.is_file() and "ByteLevel" in _types(read_json(file)))
    if name is not None and name not in SPECIAL:
        stated = settings.get("tokenizer_class") or config.get("tokenizer_class")
        why = f"tokenizer_class {stated}" if stated else f"model_type {config.get('model_type')} of its config.json"
        raise UserError(
            f"tokenizer {folder}: transformers opens it as {name} ({why}), whose tokenization steps are not "
            f"supported; {SAVE}, and name PreTrainedTokenizerFast as tokenizer_class in OTHER/tokenizer_config.json"
        )
    return name


def _remarks(folder: Path, settings: Mapping[str, Any], built: tokenizers.Tokenizer) -> tuple[str, ...]:
    """Warnings about a folder; also fixes the Mistral pattern if the folder asks for it."""
    file = folder / "config.json"
    about_mistral = mistral_regex.mend(built, settings, read_json(file) if file.is_file() else None)
    program = program_of(settings)
    about_program = program and (
        f"auto_map in tokenizer_config.json names custom code, {program}, which is not run: text is split according "
        "to the other files, and may be split differently by AutoTokenizer with trust_remote_code"
    )
    return tuple(f"tokenizer {folder}: {text}" for text in (about_mistral, about_program) if text)


def _types(recipe: dict[str, Any]) -> set[str]:
    """Every `type` of the steps before and after the model."""
    return set(types_of([recipe.get("normalizer"), recipe.get("pre_tokenizer"), recipe.get("decoder")]))


def types_of(recipe: Any) -> Iterator[str]:
    """Yields every `type` in the nested description of a tokenizer's steps."""
    if isinstance(recipe, dict):
        if isinstance(recipe.get("type"), str):
            yield recipe["type"]
        recipe = list(recipe.values())
    if isinstance(recipe, list):
        for part in recipe:
            yield from types_of(part)


def _from_json(
    file: Path, settings: Mapping[str, Any], made_by: str | None
) -> tuple[tokenizers.Tokenizer, list[dict[str, Any]], dict[str, str]]:
    """Reads tokenizer.json: the tokenizer, the file's added tokens that the tokenizer lacks, and the file's padding
    token, which is the default of pad_token."""
    import tokenizers

    built = tokenizers.Tokenizer.from_file(str(file))
    padding = {"pad_token": built.padding["pad_token"]} if built.padding else {}
    built.no_truncation()  # the file stores the settings of the last call before it was saved
    built.no_padding()
    if made_by is None:
        return built, [], padding
    recipe = read_json(file)
    vocabulary = recipe["model"]["vocab"]
    if "merges" not in recipe["model"]:  # for example a unigram model, which the class would read as BPE without merges
        raise UserError(
            f"tokenizer {file}: its model is not BPE, but transformers' {made_by} reads it as BPE; set tokenizer_class "
            "to PreTrainedTokenizerFast in a tokenizer_config.json without a config.json beside it"
        )
    merges: list[tuple[str, str]] = []
    for merge in recipe["model"]["merges"]:  # two pieces each, or `from_file` had refused them
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((first, second))
    rebuilt = of_class(made_by, vocabulary, merges, settings)
    if (
        built.post_processor is not None and made_by != "GPTNeoXTokenizer"
    ):  # this class has its own, which adds no tokens
        rebuilt.post_processor = built.post_processor
    return rebuilt, recipe.get("added_tokens", []), padding


def _from_vocabulary(file: Path, settings: Mapping[str, Any], made_by: str | None) -> tokenizers.Tokenizer:
    """Builds a tokenizer from vocab.json and the merges.txt beside it; the class determines the other steps.

    Raises:
        UserError: the folder names no class, or one that reads other files.
    """
    from tokenizers import models

    if made_by not in OF_PARTS:
        named = f"{made_by} of transformers does not read them" if made_by else "no class is named that reads them"
        raise UserError(
            f"tokenizer {file.parent}: vocab.json and merges.txt need a tokenizer class, and {named}; set "
            "tokenizer_class in tokenizer_config.json to the class that they were made with, without a config.json "
            f"that contradicts it; valid values: {', '.join(OF_PARTS)}"
        )
    vocabulary, merges = models.BPE.read_file(str(file), str(file.parent / "merges.txt"))
    return of_class(made_by, vocabulary, merges, settings)


def _added_tokens(
    behind: dict[str, Any], settings: Mapping[str, Any], legacy: bool, listed: list[dict[str, Any]]
) -> dict[int, tokenizers.AddedToken]:
    """Added tokens by id."""
    import tokenizers

    found: dict[int, tokenizers.AddedToken] = {}
    if not legacy:
        for number, token in settings["added_tokens_decoder"].items():
            found[int(number)] = _token(token)
        return found
    special = {_content(settings[key]) for key in NAMED if settings.get(key)}
    special |= {_content(token) for token in _extra(settings)}
    for text, number in behind.items():
        is_special = text in special
        found[number] = tokenizers.AddedToken(text, normalized=not is_special, special=is_special)
    for token in listed:
        found[token["id"]] = _token({key: value for key, value in token.items() if key != "id"})
    return found


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    """Unnamed special tokens."""
    return list(settings.get("extra_special_tokens") or [])


def _roles(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Named special tokens: the common ones first, then the model-specific ones."""
    return {key: settings[key] for key in NAMED if _content(settings.get(key))} | dict(settings.get(OWN) or {})


def _add(built: tokenizers.Tokenizer, settings: Mapping[str, Any], added: dict[int, tokenizers.AddedToken]) -> None:
    """Adds the tokens of the other files to the tokenizer."""
    there = built.get_added_tokens_decoder().values()
    known = {repr(token) for token in there}
    new = [token for _, token in sorted(added.items()) if repr(token) not in known]
    texts = {token.content for token in (*there, *new)}
    by_text = {token.content: token for token in added.values()}
    roles = list(_roles(settings).values())
    named = {_content(token) for token in roles}
    for token in (*roles, *_extra(settings)):
        text = _content(token)
        if text not in texts:
            new.append(by_text.get(text) or _token(token))
            texts.add(text)
    for token in new:
        if token.content in named:
            token.special = True
    if new:
        built.add_tokens(new)


def _token(token: Any) -> tokenizers.AddedToken:
    import tokenizers

    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise UserError(f"a token is {json.dumps(token)[:60]}, which is not a string: save the tokenizer again")
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(**{"special": True, **{key: token[key] for key in known if key in token}})


def _unnormalized(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    import tokenizers

    return tokenizers.AddedToken(**{**token.__getstate__(), "normalized": False})


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _around(
    built: tokenizers.Tokenizer, settings: Mapping[str, Any], has_json: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that are added before and after a text."""
    if has_json:  # the flags of tokenizer_config.json apply to a SentencePiece model only
        plain = built.encode("a", add_special_tokens=False).ids
        whole = built.encode("a", add_special_tokens=True).ids
        extra = len(whole) - len(plain)
        start = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    sides = []
    for name in ("bos", "eos"):
        token = built.token_to_id(_content(settings.get(f"{name}_token")) or "")
        sides.append((token,) if settings.get(f"add_{name}_token") and token is not None else ())
    return sides[0], sides[1]


def _named(built: tokenizers.Tokenizer, settings: Mapping[str, Any], name: str) -> int | None:
    """Id of the bos or eos token in the tokenizer's settings."""
    content = _content(settings.get(f"{name}_token"))
    return built.token_to_id(content) if content else None


def _of_model(folder: Path, name: str) -> list[int]:
    """bos or eos ids of the model's config files; generation_config.json takes precedence over config.json."""
    return _ids_in(folder / _GENERATION, name) or _ids_in(folder / "config.json", name)


def _stops_of_model(folder: Path) -> list[int]:
    """Stop ids of transformers' generate: from generation_config.json, or from config.json without that file."""
    file = folder / _GENERATION
    return _ids_in(file if file.is_file() else folder / "config.json", "eos")


def _ids_in(file: Path, name: str) -> list[int]:
    token = read_json(file).get(f"{name}_token_id")
    tokens = token if isinstance(token, list) else [] if token is None else [token]
    for each in tokens:
        if type(each) is not int:
            raise UserError(f"{file}: {name}_token_id {token!r} is not an integer: save the model again")
    return tokens


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, or {} if there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer {file} is not valid JSON ({error}): save the tokenizer again") from None
    return content if isinstance(content, dict) else {}
