"""Tokenization steps that transformers applies for its tokenizer classes and for a SentencePiece model.

They follow `LlamaTokenizer`, `GPT2Tokenizer` and the like, and `SpmConverter.build_tokenizer_from_spm_proto` of
transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_capgap.common.errors import UserError
from megatron_capgap.data import sentencepiece_proto
from megatron_capgap.data.sentencepiece_proto import NORMAL, USER_DEFINED

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # SentencePiece writes a space as this character


_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|\p{{N}}| ?[^\s{others}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ALONE = "<|endoftext|>"
_OF_GPT2 = {"bos_token": _ALONE, "eos_token": _ALONE, "unk_token": _ALONE}
_OF_QWEN = {"eos_token": _ALONE, "unk_token": _ALONE, "pad_token": _ALONE}
_OF_COHERE = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"}
_OF_COHERE |= {"pad_token": "<PAD>", "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"}
_OF_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
SPECIAL: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {**_OF_GEMMA, "mask_token": "<mask>"},
    "GPT2Tokenizer": _OF_GPT2,
    "CodeGenTokenizer": _OF_GPT2,
    "GPTNeoXTokenizer": {**_OF_GPT2, "pad_token": "<|padding|>"},
    "CohereTokenizer": _OF_COHERE,
    "Qwen2Tokenizer": _OF_QWEN,
    "Qwen3_5Tokenizer": _OF_QWEN,
}
"""The supported transformers classes, with their default special tokens."""
OF_PARTS = ("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "CohereTokenizer", "Qwen2Tokenizer")
"""The classes that read vocab.json and merges.txt; Qwen3_5Tokenizer does not."""


def of_class(
    name: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Builds a tokenizer with the steps of a transformers class.

    Args:
        name: a key of `SPECIAL`.
        vocabulary: id of each piece.
        merges: pairs, in order of precedence.
        settings: content of tokenizer_config.json.
    """
    if name == "LlamaTokenizer":
        return _llama(vocabulary, merges, settings)
    if name == "GemmaTokenizer":
        return _gemma(vocabulary, merges, settings)
    return _byte_level(name, vocabulary, merges, settings)


def _llama(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if settings.get("legacy", False) else "first"
    built.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return built


def _gemma(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    unknown = settings.get("unk_token")
    unknown = unknown["content"] if isinstance(unknown, dict) else str(unknown)
    if unknown not in vocabulary:
        raise ValueError(f"GemmaTokenizer needs its unk_token {unknown} in the vocabulary")
    how = {"fuse_unk": True, "byte_fallback": True}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, **how))
    built.normalizer = normalizers.Replace(" ", SPACE)
    built.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return built


def _byte_level(
    name: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    how = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **how))
    prefix = bool(settings.get("add_prefix_space"))
    if name not in ("GPT2Tokenizer", "CodeGenTokenizer"):
        built.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    if name == "CohereTokenizer":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if name in ("Qwen2Tokenizer", "Qwen3_5Tokenizer"):
        marks = r"\p{M}" if name == "Qwen3_5Tokenizer" else ""
        letters = rf"[\p{{L}}{marks}]" if marks else r"\p{L}"
        words = Regex(_QWEN.format(letters=letters, others=rf"\p{{L}}{marks}"))
        steps = [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(prefix, use_regex=False)]
    built.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    built.decoder = decoders.ByteLevel()
    return built


def of_sentencepiece(
    model: sentencepiece_proto.Model, file: Path, settings: Mapping[str, Any], name: str | None
) -> tokenizers.Tokenizer:
    """Builds a tokenizer from a SentencePiece model, with the model's own steps or those of the class `name`."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    pieces = [piece.text for piece in model.pieces] if name else _renamed(model, settings)
    if model.kind == "bpe":
        vocabulary = {text: number for number, text in enumerate(pieces)}
        merges = _merges(model, pieces)
        if name:
            return of_class(name, vocabulary, merges, settings)
        core: Any = models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=pieces[model.special["unk_token"]],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=any(piece.kind == USER_DEFINED for piece in model.pieces),
        )
    elif model.kind == "unigram" and not name:
        scores = [(text, piece.score) for text, piece in zip(pieces, model.pieces, strict=True)]
        core = models.Unigram(scores, unk_id=model.special["unk_token"], byte_fallback=model.byte_fallback)
    else:
        raise UserError(
            f"tokenizer {file}: a SentencePiece model of kind {model.kind} cannot be read as "
            f"{name or 'a folder'}; give the .model file itself"
        )
    built = tokenizers.Tokenizer(core)
    prefixed_each = bool(settings.get("legacy", True))
    steps: list[Any] = [normalizers.Precompiled(model.character_map)] if model.character_map else []
    if model.removes_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.escapes_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if model.adds_prefix and prefixed_each:  # Metaspace adds no space before a space; SentencePiece does
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    built.normalizer = normalizers.Sequence(steps)
    before: list[Any] = []
    if model.adds_prefix:
        scheme = "always" if prefixed_each else "first"
        before.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False))
    own = sorted((pieces[i] for i, p in enumerate(model.pieces) if p.kind == USER_DEFINED), key=len, reverse=True)
    if own:  # never split
        before.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), behavior="isolated"))
    if before:
        built.pre_tokenizer = pre_tokenizers.Sequence(before)
    after: list[Any] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        after.append(decoders.ByteFallback())
    if model.adds_prefix:
        after += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    elif model.byte_fallback:
        after.append(decoders.Fuse())
    built.decoder = decoders.Sequence(after)
    return built


def _renamed(model: sentencepiece_proto.Model, settings: Mapping[str, Any]) -> list[str]:
    """Pieces by id, renamed where tokenizer_config.json has a different text."""
    listed = {
        int(key): token["content"] if isinstance(token, dict) else token
        for key, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    pieces = [piece.text for piece in model.pieces]
    kept = {text for number, text in enumerate(pieces) if number not in listed}
    return [listed[i] if i in listed and listed[i] not in kept else text for i, text in enumerate(pieces)]


def _merges(model: sentencepiece_proto.Model, pieces: list[str]) -> list[tuple[str, str]]:
    """The merges of the pieces, in order of precedence: SentencePiece merges towards the piece with the best score.

    A piece can result from several pairs; each is listed.
    """
    rank = {pieces[i]: (-piece.score, i) for i, piece in enumerate(model.pieces) if piece.kind == NORMAL}
    found = []
    for piece, place in rank.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in rank and right in rank:
                found.append((*place, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]
