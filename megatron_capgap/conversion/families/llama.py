"""LLaMA 1, 2 and 3, SmolLM; and the tensor names, rotary positions and sizes that related families share."""

from __future__ import annotations

from typing import Any

from megatron_capgap.config import derived
from megatron_capgap.config.schema import ModelShape, RopeScaling
from megatron_capgap.conversion.family import Family, Settings, TensorMapping

EMBEDDINGS = (
    TensorMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    TensorMapping("decoder.final_layernorm.weight", ("model.norm.weight",)),
    TensorMapping("output_layer.weight", ("lm_head.weight",)),
)
_LAYER = "model.layers.{layer}"
QKV = tuple(f"{_LAYER}.self_attn.{name}_proj" for name in "qkv")
MATRICES = (
    TensorMapping("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (f"{_LAYER}.input_layernorm.weight",)),
    TensorMapping("decoder.layers.self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in QKV), "qkv"),
    TensorMapping("decoder.layers.self_attention.linear_proj.weight", (f"{_LAYER}.self_attn.o_proj.weight",)),
    TensorMapping("decoder.layers.mlp.linear_fc1.layer_norm_weight", (f"{_LAYER}.post_attention_layernorm.weight",)),
    TensorMapping(
        "decoder.layers.mlp.linear_fc1.weight",
        (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
        "gate_up",
    ),
    TensorMapping("decoder.layers.mlp.linear_fc2.weight", (f"{_LAYER}.mlp.down_proj.weight",)),
)
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def sizes(
    settings: Settings, *, max_positions: int, head_dim: int | None = None, kv_heads: int | None = None
) -> dict[str, Any]:
    """Sizes whose keys LLaMA and related families share.

    Args:
        settings: the config.json.
        max_positions, head_dim, kv_heads: defaults of the family.
    """
    settings.require_one_of("hidden_act", ("silu",), "silu")
    reject_partial_rotary(settings)
    return {
        "layers": settings.require("num_hidden_layers"),
        "hidden": settings.require("hidden_size"),
        "heads": settings.require("num_attention_heads"),
        # null means as many as query heads; the family's default applies only if the key is missing.
        "kv_heads": settings.content.get("num_key_value_heads", kv_heads),
        "head_dim": settings.get("head_dim", head_dim),
        "ffn": settings.require("intermediate_size"),
        "vocab": settings.require("vocab_size"),
        "max_positions": settings.get("max_position_embeddings", max_positions),
        "norm_epsilon": settings.get("rms_norm_eps", 1e-6),
        "init_std": settings.get("initializer_range", 0.02),
        "tied_embeddings": settings.get("tie_word_embeddings", False),
        **rotary(settings),
    }


def rope_section(settings: Settings) -> dict[str, Any]:
    """Settings of rotary positions: transformers 5 uses rope_parameters, but rope_scaling takes precedence."""
    return settings.section("rope_scaling") or settings.section("rope_parameters")


def reject_partial_rotary(settings: Settings) -> None:
    """Rejects partially rotated heads."""
    for place in (rope_section(settings), settings.content):
        if (share := place.get("partial_rotary_factor")) not in (None, 1.0):
            raise settings.error("partial_rotary_factor", f"{share!r} is not supported, 1.0 is; convert another model")


def rotary(settings: Settings, base_key: str = "rope_theta") -> dict[str, Any]:
    """Base and scaling of the rotary positions."""
    section = rope_section(settings)
    kind = section.get("rope_type", section.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": section.get("rope_theta", settings.get(base_key, 10000.0))}
    if kind not in tuple(_ROPE_KEYS):
        raise settings.error("rope_type", f'"{kind}" is not supported, default, linear and llama3 are')
    # Reject keys that are not read, among them sections per layer type.
    if unread := sorted(
        section.keys() - _ROPE_KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    ):
        raise settings.error("rope_parameters", f"{unread[0]} is not supported with {kind}; convert another model")
    if kind == "linear":
        found["rope_scaling"] = {"kind": kind, "factor": section.get("factor")}
    if kind == "llama3":
        trained = section.get("original_max_position_embeddings", settings.get("max_position_embeddings", None))
        found["rope_scaling"] = {
            "kind": kind,
            "factor": section.get("factor"),
            "low_frequency_factor": section.get("low_freq_factor"),
            "high_frequency_factor": section.get("high_freq_factor"),
            "original_max_positions": trained,
        }
    return found


def rotary_config(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, in a form that every version of transformers reads."""
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def sizes_config(shape: ModelShape, max_positions: int) -> dict[str, Any]:
    """The inverse of `sizes`."""
    return {
        "max_position_embeddings": max_positions,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": derived.kv_heads(shape),
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_epsilon,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_theta": shape.rope_theta,
        "rope_scaling": rotary_config(shape.rope_scaling),
    }


def _shape(settings: Settings) -> dict[str, Any]:
    settings.require_one_of("attention_bias", (False,), False)
    settings.require_one_of("mlp_bias", (False,), False)
    return sizes(settings, max_positions=2048)


def _config(shape: ModelShape, max_positions: int) -> dict[str, Any]:
    return {
        **sizes_config(shape, max_positions),
        "head_dim": derived.head_dim(shape),
        "attention_bias": False,
        "mlp_bias": False,
    }


FAMILY = Family("llama", "LlamaForCausalLM", "model.", (*EMBEDDINGS, *MATRICES), BUFFERS, _shape, _config)
