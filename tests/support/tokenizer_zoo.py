"""Tokenizer folders as they are found in the field, small."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AutoTokenizer

from megatron_capgap.conversion.tokenizer import translate
from megatron_capgap.data.tokenizer import SentencePieceTokenizer, Tokenizer, open_tokenizer
from tests.support.corpus import byte_level, texts

SIZE = 320
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **SPECIAL}
TURNS = ("<|im_start|>", "<|im_end|>")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
LISTED = {str(SIZE + i): {"content": text, **_PLAIN, "special": True} for i, text in enumerate(TURNS)}
AFTER = {text: SIZE + i for i, text in enumerate(TURNS)}
CUT = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PAD = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None}
PAD |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def build(folder: Path) -> dict[str, Path]:
    """Writes every kind of folder; returns them by name."""
    plain = _sentencepiece(model_type="bpe", byte_fallback=True, **_AS_WRITTEN)
    (folder / "plain.model").write_bytes(plain)
    prepend = json.loads(
        translate(folder / "plain.model", SentencePieceTokenizer(folder / "plain.model")).tokenizer_json
    )
    found = {}
    for name, files in kinds(plain, prepend):
        found[name] = folder / name
        found[name].mkdir()
        for file, content in files.items():
            path = found[name] / file
            path.write_bytes(content) if isinstance(content, bytes) else path.write_text(json.dumps(content))
    return found


def opener(zoo: dict[str, Path]) -> Callable[[str], tuple[Tokenizer, Any]]:
    """Opens a folder, once: ours and transformers'."""

    @cache
    def opened(name: str) -> tuple[Tokenizer, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return open_tokenizer(str(zoo[name])), AutoTokenizer.from_pretrained(zoo[name])

    return opened


_AS_WRITTEN: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def kinds(plain: bytes, prepend: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    config, model, words = "tokenizer_config.json", "tokenizer.model", "tokenizer.json"
    yield "sentencepiece", {model: plain}
    yield "sentencepiece_fast", {model: plain, config: FAST}
    for legacy in (True, False):
        yield f"sentencepiece_llama_legacy_{legacy}", {model: plain, config: {**LLAMA, "legacy": legacy}}
    listed = {**LLAMA, "added_tokens_decoder": LISTED, "eos_token": "<|im_end|>"}
    yield "sentencepiece_llama_listed", {model: plain, config: listed}
    yield "sentencepiece_llama_added", {model: plain, config: {**LLAMA, "legacy": True}, "added_tokens.json": AFTER}
    yield "sentencepiece_llama_bos", {model: plain, config: {**LLAMA, "add_bos_token": True}}
    both = {**FAST, "add_bos_token": True, "add_eos_token": True, "added_tokens_decoder": LISTED}
    yield "sentencepiece_bos_and_eos", {model: plain, config: both}
    yield "sentencepiece_nfkc", {model: _sentencepiece(model_type="bpe")}
    yield "sentencepiece_unprefixed", {model: _sentencepiece(model_type="bpe", add_dummy_prefix=False)}
    yield "unigram", {model: _sentencepiece(model_type="unigram")}
    own = {"user_defined_symbols": list(TURNS), "control_symbols": ["<ctl>"], "byte_fallback": True}
    yield "sentencepiece_symbols", {model: _sentencepiece(model_type="bpe", **own)}
    yield "sentencepiece_llama_symbols", {model: _sentencepiece(model_type="bpe", **own, **_AS_WRITTEN), config: LLAMA}

    yield "prepend", {words: prepend, config: FAST}
    for legacy in (True, False):
        yield f"prepend_llama_legacy_{legacy}", {words: prepend, config: {**LLAMA, "legacy": legacy}}
    mistral = {"model_type": "mistral"}
    yield "prepend_mistral", {words: prepend, config: LLAMA, "config.json": mistral}
    for scheme in ("first", "always", "never"):
        yield f"metaspace_{scheme}", {words: _metaspace(prepend, scheme), config: FAST}
    yield "metaspace_llama", {words: _metaspace(prepend, "always"), config: LLAMA}
    words_of_bytes = json.loads(byte_level(texts(300, seed=3), SIZE, ["<s>", "</s>"]).to_str())
    yield "byte_level", {words: words_of_bytes, config: {**FAST, "unk_token": None}}
    yield "byte_level_llama", {words: words_of_bytes, config: {**LLAMA, "unk_token": None}}

    yield "added_tokens_json", {words: prepend, config: FAST, "added_tokens.json": AFTER}
    listed = {**FAST, "added_tokens_decoder": LISTED, "eos_token": "<|im_end|>"}
    yield "added_tokens_decoder", {words: prepend, config: listed}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        yield key, {words: prepend, config: {**FAST, "eos_token": "<|im_end|>", key: ["<|im_start|>"]}}
    special = {"eos_token": {"content": "<|im_end|>", **_PLAIN}, "additional_special_tokens": ["<|im_start|>"]}
    yield "special_tokens_map", {words: prepend, config: FAST, "special_tokens_map.json": special}
    yield "special_tokens_map_alone", {words: prepend, "special_tokens_map.json": special}
    yield "pad", {words: prepend, config: {**FAST, "pad_token": "[PAD]"}}
    yield "own_role", {words: prepend, config: {**FAST, "image_token": "<image>"}}

    yield "bos", {words: {**prepend, "post_processor": POST}, config: FAST}
    yield "bos_switched_off", {words: {**prepend, "post_processor": POST}, config: {**FAST, "add_bos_token": False}}
    yield "bos_asked_for", {words: prepend, config: {**FAST, "add_bos_token": True}}
    yield "cut_and_padded", {words: {**prepend, "truncation": CUT, "padding": PAD}, config: FAST}
    yield "no_config", {words: prepend}


def _sentencepiece(**how: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(300, seed=3)),
        model_writer=model,
        vocab_size=SIZE,
        hard_vocab_limit=False,
        minloglevel=2,
        **how,
    )
    return model.getvalue()


def _metaspace(prepend: dict[str, Any], scheme: str) -> dict[str, Any]:
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    return {**prepend, "normalizer": None, "pre_tokenizer": step}
