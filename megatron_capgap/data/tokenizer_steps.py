"""The steps that transformers puts around a vocabulary: of its LlamaTokenizer, and of a SentencePiece model.

They follow `LlamaTokenizer` and `SpmConverter.build_tokenizer_from_spm_proto` of transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_capgap.config.errors import UserError
from megatron_capgap.data import sentencepiece_file
from megatron_capgap.data.sentencepiece_file import NORMAL, USER_DEFINED

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # SentencePiece writes a space as this character


def llama(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """The steps of LlamaTokenizer."""
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


def of_sentencepiece(
    model: sentencepiece_file.Model, file: Path, settings: Mapping[str, Any], is_llama: bool
) -> tokenizers.Tokenizer:
    """A SentencePiece model with the steps of the tokenizers library around it."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    pieces = [piece.text for piece in model.pieces] if is_llama else _renamed(model, settings)
    if model.kind == "bpe":
        vocabulary = {text: number for number, text in enumerate(pieces)}
        merges = _merges(model, pieces)
        if is_llama:
            return llama(vocabulary, merges, settings)
        core: Any = models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=pieces[model.special["unk_token"]],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=any(piece.kind == USER_DEFINED for piece in model.pieces),
        )
    elif model.kind == "unigram" and not is_llama:
        scores = [(text, piece.score) for text, piece in zip(pieces, model.pieces, strict=True)]
        core = models.Unigram(scores, unk_id=model.special["unk_token"], byte_fallback=model.byte_fallback)
    else:
        raise UserError(
            f"tokenizer {file}: a SentencePiece model of kind {model.kind} cannot be read as "
            f"{'LlamaTokenizer' if is_llama else 'a folder'}; give the .model file itself"
        )
    built = tokenizers.Tokenizer(core)
    prefixed_each = bool(settings.get("legacy", True))
    steps: list[Any] = [normalizers.Precompiled(model.character_map)] if model.character_map else []
    if model.removes_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.escapes_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if model.adds_prefix and prefixed_each:  # Metaspace adds none where there is one; SentencePiece does
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    built.normalizer = normalizers.Sequence(steps)
    before: list[Any] = []
    if model.adds_prefix:
        scheme = "always" if prefixed_each else "first"
        before.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False))
    own = sorted((pieces[i] for i, p in enumerate(model.pieces) if p.kind == USER_DEFINED), key=len, reverse=True)
    if own:  # whole wherever they stand
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


def _renamed(model: sentencepiece_file.Model, settings: Mapping[str, Any]) -> list[str]:
    """The pieces by id, some of which tokenizer_config.json may write otherwise."""
    listed = {
        int(key): token["content"] if isinstance(token, dict) else token
        for key, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    pieces = [piece.text for piece in model.pieces]
    kept = {text for number, text in enumerate(pieces) if number not in listed}
    return [listed[i] if i in listed and listed[i] not in kept else text for i, text in enumerate(pieces)]


def _merges(model: sentencepiece_file.Model, pieces: list[str]) -> list[tuple[str, str]]:
    """The merges that make the pieces, first to last: SentencePiece merges towards the piece of the best score.

    A piece can come from several pairs; each is listed, for whichever stands in a text is merged.
    """
    rank = {pieces[i]: (-piece.score, i) for i, piece in enumerate(model.pieces) if piece.kind == NORMAL}
    found = []
    for piece, place in rank.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in rank and right in rank:
                found.append((*place, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]
