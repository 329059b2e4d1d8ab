"""GPT-NeoX, Pythia: parallel residuals, rotary positions on a share of each head, LayerNorm, GELU, biases.

Its fused queries, keys and values are stored head by head, which is Megatron's format for groups of one query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion.families import llama
from megatron_capgap.conversion.family import Family, Settings, TensorMapping

_EMBEDDINGS = (
    TensorMapping("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",)),
    TensorMapping("decoder.final_layernorm.weight", ("gpt_neox.final_layer_norm.weight",)),
    TensorMapping("decoder.final_layernorm.bias", ("gpt_neox.final_layer_norm.bias",)),
    TensorMapping("output_layer.weight", ("embed_out.weight",)),
)
_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_qkv.": "attention.query_key_value.",
    "self_attention.linear_proj.": "attention.dense.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}


def _layer() -> Iterator[TensorMapping]:
    for ours, theirs in _NAMES.items():
        for kind in ("weight", "bias"):
            yield TensorMapping(f"decoder.layers.{ours}{kind}", (f"gpt_neox.layers.{{layer}}.{theirs}{kind}",))


def _shape(settings: Settings) -> dict[str, Any]:
    settings.require_one_of("hidden_act", ("gelu",), "gelu")
    settings.require_one_of("use_parallel_residual", (True,), True)
    settings.require_one_of("attention_bias", (True,), True)
    share = llama.rope_section(settings).get("partial_rotary_factor", settings.get("rotary_pct", 0.25))
    return {
        "layers": settings.require("num_hidden_layers"),
        "hidden": settings.require("hidden_size"),
        "heads": settings.require("num_attention_heads"),
        "ffn": settings.require("intermediate_size"),
        "vocab": settings.require("vocab_size"),
        "max_positions": settings.get("max_position_embeddings", 2048),
        "norm_epsilon": settings.get("layer_norm_eps", 1e-5),
        "init_std": settings.get("initializer_range", 0.02),
        "tied_embeddings": settings.get("tie_word_embeddings", False),
        "rotary_share": share,
        **llama.rotary(settings, "rotary_emb_base"),
    }


def _config(shape: ModelShape, max_positions: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "max_position_embeddings": max_positions,
        "hidden_act": "gelu",
        "layer_norm_eps": shape.norm_epsilon,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tied_embeddings,
        "rotary_pct": shape.rotary_share,
        "rotary_emb_base": shape.rope_theta,
        "rope_scaling": llama.rotary_config(shape.rope_scaling),
        "use_parallel_residual": True,
        "attention_bias": True,
    }


FAMILY = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "gpt_neox.",
    (*_EMBEDDINGS, *_layer()),
    (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    _shape,
    _config,
)
