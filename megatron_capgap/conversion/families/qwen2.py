"""Qwen 2 and 2.5: LLaMA's layers with biases of queries, keys and values."""

from __future__ import annotations

from typing import Any

from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion.families import llama
from megatron_capgap.conversion.family import Family, Settings, TensorMapping

_BIASES = (
    TensorMapping("decoder.layers.self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in llama.QKV), "qkv"),
)


def full_attention(settings: Settings) -> None:
    """Rejects sliding-window layers, which Qwen can mix with full-attention layers."""
    settings.require_one_of("use_sliding_window", (False,), False)
    if any(kind != "full_attention" for kind in settings.names("layer_types")):
        raise settings.error("layer_types", "only full_attention is supported; convert another model")


def full_attention_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `full_attention`."""
    return {"use_sliding_window": False, "layer_types": ["full_attention"] * shape.layers}


def _shape(settings: Settings) -> dict[str, Any]:
    full_attention(settings)
    return llama.sizes(settings, max_positions=32768, kv_heads=32)


def _config(shape: ModelShape, max_positions: int) -> dict[str, Any]:
    own = {"head_dim": shape.head_dim} if shape.head_dim else {}
    return {**llama.sizes_config(shape, max_positions), **own, **full_attention_config(shape)}


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "model.",
    (*llama.EMBEDDINGS, *llama.MATRICES, *_BIASES),
    llama.BUFFERS,
    _shape,
    _config,
)
