"""GPT-2: learned positions, LayerNorm, GELU, biases, and matrices stored as `[in, out]`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion.family import Family, Settings, TensorMapping

_EMBEDDINGS = (
    TensorMapping("embedding.word_embeddings.weight", ("transformer.wte.weight",)),
    TensorMapping("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    TensorMapping("decoder.final_layernorm.weight", ("transformer.ln_f.weight",)),
    TensorMapping("decoder.final_layernorm.bias", ("transformer.ln_f.bias",)),
    TensorMapping("output_layer.weight", ("lm_head.weight",)),
)


def _layer() -> Iterator[TensorMapping]:
    theirs, ours = "transformer.h.{layer}", "decoder.layers"
    norms = {"self_attention.linear_qkv": "ln_1", "mlp.linear_fc1": "ln_2"}
    linears = {
        "self_attention.linear_qkv": ("attn.c_attn", "qkv_stacked"),
        "self_attention.linear_proj": ("attn.c_proj", None),
        "mlp.linear_fc1": ("mlp.c_fc", None),
        "mlp.linear_fc2": ("mlp.c_proj", None),
    }
    for kind in ("weight", "bias"):
        for key, name in norms.items():
            yield TensorMapping(f"{ours}.{key}.layer_norm_{kind}", (f"{theirs}.{name}.{kind}",))
        for key, (name, packing) in linears.items():
            yield TensorMapping(
                f"{ours}.{key}.{kind}", (f"{theirs}.{name}.{kind}",), packing, transposed=kind == "weight"
            )


def _shape(settings: Settings) -> dict[str, Any]:
    settings.require_one_of("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    settings.require_one_of("scale_attn_weights", (True,), True)
    settings.require_one_of("scale_attn_by_inverse_layer_idx", (False,), False)
    settings.require_one_of("add_cross_attention", (False,), False)
    hidden = settings.require("n_embd")
    if not isinstance(hidden, int):
        raise settings.error("n_embd", f"{hidden!r} is not an integer; save the model again")
    return {
        "layers": settings.require("n_layer"),
        "hidden": hidden,
        "heads": settings.require("n_head"),
        "ffn": settings.get("n_inner", 4 * hidden),
        "vocab": settings.require("vocab_size"),
        "max_positions": settings.get("n_positions", 1024),
        "norm_epsilon": settings.get("layer_norm_epsilon", 1e-5),
        "init_std": settings.get("initializer_range", 0.02),
        "tied_embeddings": settings.get("tie_word_embeddings", True),
    }


def _config(shape: ModelShape, max_positions: int) -> dict[str, Any]:
    return {
        "n_layer": shape.layers,
        "n_embd": shape.hidden,
        "n_head": shape.heads,
        "n_inner": shape.ffn,
        "vocab_size": shape.vocab,
        "n_positions": max_positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shape.norm_epsilon,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tied_embeddings,
    }


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "transformer.",
    (*_EMBEDDINGS, *_layer()),
    (r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    _shape,
    _config,
)
