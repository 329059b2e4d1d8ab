"""Qwen 3, dense: LLaMA's layers with a norm of each head's query and key."""

from __future__ import annotations

from typing import Any

from megatron_capgap.config import derived
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion.families import llama
from megatron_capgap.conversion.families.qwen2 import full_attention, full_attention_config
from megatron_capgap.conversion.family import Family, Settings, TensorMapping

_NORMS = tuple(
    TensorMapping(
        f"decoder.layers.self_attention.{name}_layernorm.weight",
        (f"model.layers.{{layer}}.self_attn.{name}_norm.weight",),
    )
    for name in "qk"
)


def _shape(settings: Settings) -> dict[str, Any]:
    full_attention(settings)
    settings.require_one_of("attention_bias", (False,), False)
    return llama.sizes(settings, max_positions=32768, head_dim=128, kv_heads=32)


def _config(shape: ModelShape, max_positions: int) -> dict[str, Any]:
    return {
        **llama.sizes_config(shape, max_positions),
        "head_dim": derived.head_dim(shape),
        "attention_bias": False,
        **full_attention_config(shape),
    }


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "model.",
    (*llama.EMBEDDINGS, *llama.MATRICES, *_NORMS),
    llama.BUFFERS,
    _shape,
    _config,
)
