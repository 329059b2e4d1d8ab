"""Fixes the pre-tokenizer pattern of Mistral vocabularies if `fix_mistral_regex` is set in tokenizer_config.json.

A tokenizer.json from before transformers 5 has a pattern that differs from Mistral's own tokenizer. This follows
`TokenizersBackend._patch_mistral_regex` of transformers 5, for folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

KEY = "fix_mistral_regex"
_MODELS = (None, "mistral", "mistral3", "voxtral", "ministral", "pixtral")
_FEWEST = 100_000  # tokens; earlier Mistral vocabularies are smaller
_CAPITALS, _SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_PATTERN = "|".join(
    (
        rf"{_BEFORE}[{_CAPITALS}]*[{_SMALL}]+",
        rf"{_BEFORE}[{_CAPITALS}]+[{_SMALL}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def mend(built: tokenizers.Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any] | None) -> str | None:
    """Sets Mistral's own pattern if the settings ask for it, as transformers does; else returns a warning.

    Args:
        built: the folder's tokenizer, with its added tokens.
        settings: content of tokenizer_config.json.
        config: content of config.json; None without that file.
    """
    from tokenizers import Regex, pre_tokenizers

    step = built.pre_tokenizer
    if config is None or step is None or built.get_vocab_size() <= _FEWEST:
        return None
    if config.get("model_type") not in _MODELS or _is_later(config.get("transformers_version")):
        return None
    if not settings.get(KEY):
        return (
            f'text is split by the pattern in tokenizer.json, which is not Mistral\'s own; set "{KEY}": true in '
            "tokenizer_config.json to use the right pattern, here and in transformers"
        )
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    if isinstance(step, pre_tokenizers.Sequence):
        step[0] = split
        built.pre_tokenizer = step
        return None
    if isinstance(step, pre_tokenizers.Metaspace):
        step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([split, step])
    return None


def _is_later(version: Any) -> bool:
    """Whether a model was saved by a final release of transformers 5 or later, whose files have the right pattern."""
    found = re.match(r"(\d+)((?:\.\d+)*)(.*)", version) if isinstance(version, str) else None
    if found is None:
        return False
    preview = re.match(r"[._-]?(?:a|b|c|rc|alpha|beta|pre|preview|dev)", found[3]) is not None
    first = not re.search(r"[1-9]", found[2])
    return int(found[1]) > 5 or (int(found[1]) == 5 and not (first and preview))
