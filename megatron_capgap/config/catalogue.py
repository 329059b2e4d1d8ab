"""Published shapes of models, by name: they stand in for a checkpoint in `--check` and `--plan`."""

from __future__ import annotations

from typing import Any

_LLAMA_31 = {"kind": "llama3", "factor": 8.0, "original_max_positions": 8192}
_LLAMA_32 = {**_LLAMA_31, "factor": 32.0}
_SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")

# Line: (keys of all its members, {member: sizes in the order of _SIZES, and further keys}). Source: the config.json of
# each model, as its authors published it.
_LINES: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "llama-2": (
        {"max_positions": 4096},
        {
            "7b": (32, 4096, 32, 32, 11008, 32000),
            "13b": (40, 5120, 40, 40, 13824, 32000),
            "70b": (80, 8192, 64, 8, 28672, 32000),
        },
    ),
    "llama-3": (
        {"max_positions": 8192, "rope_theta": 500000.0},
        {"8b": (32, 4096, 32, 8, 14336, 128256), "70b": (80, 8192, 64, 8, 28672, 128256)},
    ),
    "llama-3.1": (
        {"max_positions": 131072, "rope_theta": 500000.0, "rope_scaling": _LLAMA_31},
        {
            "8b": (32, 4096, 32, 8, 14336, 128256),
            "70b": (80, 8192, 64, 8, 28672, 128256),
            "405b": (126, 16384, 128, 8, 53248, 128256),
        },
    ),
    "llama-3.2": (
        {"max_positions": 131072, "rope_theta": 500000.0, "rope_scaling": _LLAMA_32, "tied_embeddings": True},
        {"1b": (16, 2048, 32, 8, 8192, 128256), "3b": (28, 3072, 24, 8, 8192, 128256)},
    ),
    "llama-3.3": (
        {"max_positions": 131072, "rope_theta": 500000.0, "rope_scaling": _LLAMA_31},
        {"70b": (80, 8192, 64, 8, 28672, 128256)},
    ),
    "smollm2": (
        {"max_positions": 8192, "rope_theta": 100000.0, "tied_embeddings": True},
        {
            "135m": (30, 576, 9, 3, 1536, 49152),
            "360m": (32, 960, 15, 5, 2560, 49152),
            "1.7b": (24, 2048, 32, 32, 8192, 49152, {"rope_theta": 130000.0}),
        },
    ),
    "mistral": (
        {"family": "mistral", "max_positions": 32768, "rope_theta": 1000000.0},
        {
            "7b": (32, 4096, 32, 8, 14336, 32768),
            "7b-v0.3": (32, 4096, 32, 8, 14336, 32768),
            "7b-v0.1": (32, 4096, 32, 8, 14336, 32000, {"rope_theta": 10000.0, "attention_window": 4096}),
        },
    ),
    "qwen2.5": (
        {"family": "qwen2", "max_positions": 32768, "rope_theta": 1000000.0, "norm_epsilon": 1e-6},
        {
            "0.5b": (24, 896, 14, 2, 4864, 151936, {"tied_embeddings": True}),
            "1.5b": (28, 1536, 12, 2, 8960, 151936, {"tied_embeddings": True}),
            "3b": (36, 2048, 16, 2, 11008, 151936, {"tied_embeddings": True}),
            "7b": (28, 3584, 28, 4, 18944, 152064),
            "14b": (48, 5120, 40, 8, 13824, 152064),
            "32b": (64, 5120, 40, 8, 27648, 152064),
            "72b": (80, 8192, 64, 8, 29568, 152064),
        },
    ),
    "qwen3": (
        {"family": "qwen3", "head_dim": 128, "max_positions": 40960, "rope_theta": 1000000.0, "norm_epsilon": 1e-6},
        {
            "0.6b": (28, 1024, 16, 8, 3072, 151936, {"tied_embeddings": True}),
            "1.7b": (28, 2048, 16, 8, 6144, 151936, {"tied_embeddings": True}),
            "4b": (36, 2560, 32, 8, 9728, 151936, {"tied_embeddings": True}),
            "8b": (36, 4096, 32, 8, 12288, 151936),
            "14b": (40, 5120, 40, 8, 17408, 151936),
            "32b": (64, 5120, 64, 8, 25600, 151936),
        },
    ),
    "gpt2": (
        {"family": "gpt2", "max_positions": 1024, "tied_embeddings": True},
        {
            "small": (12, 768, 12, None, 3072, 50257),
            "medium": (24, 1024, 16, None, 4096, 50257),
            "large": (36, 1280, 20, None, 5120, 50257),
            "xl": (48, 1600, 25, None, 6400, 50257),
        },
    ),
    "pythia": (
        {"family": "gpt_neox", "rotary_share": 0.25, "max_positions": 2048},
        {
            "70m": (6, 512, 8, None, 2048, 50304),
            "160m": (12, 768, 12, None, 3072, 50304),
            "410m": (24, 1024, 16, None, 4096, 50304),
            "1b": (16, 2048, 8, None, 8192, 50304),
            "1.4b": (24, 2048, 16, None, 8192, 50304),
            "2.8b": (32, 2560, 32, None, 10240, 50304),
            "6.9b": (32, 4096, 32, None, 16384, 50432),
            "12b": (36, 5120, 40, None, 20480, 50688),
        },
    ),
}


def _models() -> dict[str, dict[str, Any]]:
    found = {}
    for line, (common, members) in _LINES.items():
        for member, row in members.items():
            numbers = dict(zip(_SIZES, row, strict=False))
            own = row[len(_SIZES)] if len(row) > len(_SIZES) else {}
            found[f"{line}-{member}"] = {**numbers, **common, **own}
    return {**found, "gpt2": found["gpt2-small"]}


MODELS: dict[str, dict[str, Any]] = _models()
"""Sections `model` by name, for example llama-3.1-70b."""


def model_named(name: str) -> dict[str, Any] | None:
    """The section `model` of a published model; None if the catalogue does not have it. Case is ignored, and so are
    an organisation before a slash and the words that Meta writes into names."""
    word = name.rpartition("/")[2].lower().replace("meta-", "")
    found = MODELS.get(word)
    return dict(found) if found else None
