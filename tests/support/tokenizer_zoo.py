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
import transformers
from transformers import AutoTokenizer

from megatron_capgap.conversion.tokenizer_files import translate
from megatron_capgap.data.tokenizer import SentencePieceTokenizer, Tokenizer, open_tokenizer
from megatron_capgap.data.tokenizer_steps import OF_PARTS
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
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
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

    yield from _made_anew(plain, prepend, words_of_bytes)
    yield from _in_parts(words_of_bytes["model"])

    yield "added_tokens_json", {words: prepend, config: FAST, "added_tokens.json": AFTER}
    listed = {**FAST, "added_tokens_decoder": LISTED, "eos_token": "<|im_end|>"}
    yield "added_tokens_decoder", {words: prepend, config: listed}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        yield key, {words: prepend, config: {**FAST, "eos_token": "<|im_end|>", key: ["<|im_start|>"]}}
    special = {"eos_token": {"content": "<|im_end|>", **_PLAIN}, "additional_special_tokens": ["<|im_start|>"]}
    yield "special_tokens_map", {words: prepend, config: FAST, "special_tokens_map.json": special}
    yield "special_tokens_map_alone", {words: prepend, "special_tokens_map.json": special}
    yield "pad", {words: prepend, config: {**FAST, "pad_token": "[PAD]"}}
    image, extra, more = {"image_token": "<image>", "boi": "<boi>"}, "extra_special_tokens", "additional_special_tokens"
    yield "extra_names", {words: prepend, config: {**FAST, extra: image}}
    yield "extra_names_and_more", {words: prepend, config: {**FAST, extra: image, more: ["<y>"]}}
    yield "extra_and_more", {words: prepend, config: {**FAST, extra: ["<x>"], more: ["<y>"]}}
    yield "extra_empty_and_more", {words: prepend, config: {**FAST, extra: {}, more: ["<y>"]}}
    own = {"model_specific_special_tokens": image}
    yield "names_of_the_model", {words: prepend, config: {**FAST, **own, more: ["<y>"]}}
    yield "names_of_the_model_and_role", {words: prepend, config: {**FAST, **own, "audio_token": "<audio>"}}
    special = {extra: ["<z>", "<x>"], "video_token": {"content": "<video>", **_PLAIN}, "unk_token": None}
    files = {config: {**FAST, extra: ["<x>"], **own}, "special_tokens_map.json": special}
    yield "special_tokens_map_extra", {words: prepend, **files}
    yield "own_role", {words: prepend, config: {**FAST, "image_token": "<image>"}}

    yield "bos", {words: {**prepend, "post_processor": POST}, config: FAST}
    yield "bos_switched_off", {words: {**prepend, "post_processor": POST}, config: {**FAST, "add_bos_token": False}}
    yield "bos_asked_for", {words: prepend, config: {**FAST, "add_bos_token": True}}
    yield "cut_and_padded", {words: {**prepend, "truncation": CUT, "padding": PAD}, config: FAST}
    yield "no_config", {words: prepend}


CLASSES = {
    "GPT2Tokenizer": "gpt2",
    "CodeGenTokenizer": "phi",
    "GPTNeoXTokenizer": "gpt_neox",
    "CohereTokenizer": "cohere",
    "Qwen2Tokenizer": "qwen2",
    "Qwen3_5Tokenizer": "qwen3_5",
    "GemmaTokenizer": "gemma2",
    "LlamaTokenizer": "llama",
}
"""Classes with steps of their own, each with a type of model that comes with it."""
_SPLIT = {"type": "Split", "pattern": {"Regex": "[aeiou]|\\s+"}, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}


def _made_anew(plain: bytes, prepend: dict[str, Any], of_bytes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Folders of which a class takes vocabulary and merges alone."""
    config, model, words = "tokenizer_config.json", "tokenizer.model", "tokenizer.json"
    listed = {number: {**token, "lstrip": True} for number, token in LISTED.items()}
    listed = {"eos_token": "<|im_end|>", "bos_token": "<s>", "added_tokens_decoder": listed}
    spaced = {"eos_token": {"content": "<|im_end|>", **_PLAIN, "lstrip": True}, "bos_token": "<s>"}
    for name, model_type in CLASSES.items():
        own, beside = {"tokenizer_class": name}, {"model_type": model_type}
        base = prepend if name == "GemmaTokenizer" else of_bytes  # it wants an unknown token
        split = {"type": "Sequence", "pretokenizers": [_SPLIT, _BYTES]}
        foreign = {**base, "normalizer": {"type": "Lowercase"}, "pre_tokenizer": split}
        yield f"{name}_genuine", {words: _steps_of(name, prepend, of_bytes), config: {**own, **SPECIAL}}
        yield f"{name}_foreign", {words: foreign, config: {**own, **SPECIAL}, "config.json": beside}
        yield f"{name}_prepend", {words: {**prepend, "post_processor": POST}, config: {**own, **SPECIAL}}
        yield f"{name}_prefixed", {words: foreign, config: {**own, **SPECIAL, "add_prefix_space": True}}
        yield f"{name}_fast", {words: foreign, config: {"tokenizer_class": f"{name}Fast", "pad_token": None}}
        yield f"{name}_listed", {words: base, config: {**own, **listed}}
        files = {"special_tokens_map.json": spaced, "added_tokens.json": AFTER}
        yield f"{name}_added", {words: base, config: own, **files}
        yield f"{name}_sentencepiece", {model: plain, config: {**own, **SPECIAL}}
        yield f"{name}_of_model", {words: foreign, "config.json": beside}
        yield f"{name}_misnamed", {words: foreign, config: FAST, "config.json": beside}
        yield f"{name}_elsewhere", {words: foreign, config: own, "config.json": {"model_type": "mistral"}}
        yield f"{name}_beside", {words: foreign, "config.json": {**beside, **own}}


def _in_parts(model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Folders with vocab.json and merges.txt alone."""
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    parts = {"vocab.json": model["vocab"], "merges.txt": "\n".join(["#version: 0.2", *lines, ""])}
    config, ends = "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"}
    for name, model_type in CLASSES.items():
        if name in OF_PARTS:
            own = {"tokenizer_class": name, **ends}
            yield f"{name}_parts", {**parts, config: {**own, "added_tokens_decoder": LISTED, "add_bos_token": True}}
            yield f"{name}_parts_added", {**parts, config: own, "added_tokens.json": AFTER}
            yield f"{name}_parts_of_model", {**parts, "config.json": {"model_type": model_type}}
    special = {"eos_token": {"content": "<|im_end|>", **_PLAIN}, "additional_special_tokens": ["<|im_start|>"]}
    own = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    yield "GPT2Tokenizer_parts_prefixed", {**parts, config: own, "special_tokens_map.json": special}


def _steps_of(name: str, prepend: dict[str, Any], of_bytes: dict[str, Any]) -> dict[str, Any]:
    """A vocabulary with the steps that transformers' own class saves."""
    recipe = prepend if name in ("GemmaTokenizer", "LlamaTokenizer") else of_bytes
    if not recipe:  # of `kinds`, the names alone are asked for
        return recipe
    model = recipe["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    built = getattr(transformers, name)(vocab=model["vocab"], merges=merges, **SPECIAL)
    return json.loads(built.backend_tokenizer.to_str())


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
