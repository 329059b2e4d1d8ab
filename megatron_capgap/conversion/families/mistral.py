"""Mistral 7B and Nemo: LLaMA's layers with sliding-window attention."""

from __future__ import annotations

from typing import Any

from megatron_capgap.config import derived
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion.families import llama
from megatron_capgap.conversion.family import Family, Settings


def _shape(settings: Settings) -> dict[str, Any]:
    # null means no window; the family's default applies only if the key is missing.
    window = settings.content.get("sliding_window", 4096)
    return {**llama.sizes(settings, max_positions=131072, kv_heads=8), "attention_window": window}


def _config(shape: ModelShape, max_positions: int) -> dict[str, Any]:
    return {
        **llama.sizes_config(shape, max_positions),
        "head_dim": derived.head_dim(shape),
        "sliding_window": shape.attention_window,
    }


FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    "model.",
    (*llama.EMBEDDINGS, *llama.MATRICES),
    llama.BUFFERS,
    _shape,
    _config,
)
