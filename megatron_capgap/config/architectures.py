"""What an architecture fixes: one row a family. What varies within a family is a field of `schema.ModelShape`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ArchitectureSpec:
    """The parts of a decoder layer, pre-norm in all families; the defaults are LLaMA's."""

    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Every norm but those of queries and keys, which are RMSNorm."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """In the feed-forward layer; gelu_tanh is GELU's tanh approximation."""
    gated: bool = True
    """Whether the feed-forward layer has a gate projection beside the up projection."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    linear_bias: bool = False
    """Whether every projection of a layer has a bias."""
    qk_norm: bool = False
    """Whether each head's query and key go through a norm before they are rotated."""
    learned_positions: bool = False
    """Whether positions have an embedding each; else queries and keys are rotated."""
    partial_rotary: bool = False
    """Whether a share of each head's channels may stay unrotated."""
    parallel_residual: bool = False
    """Whether the feed-forward layer reads the layer's input, beside attention instead of behind it."""
    grouped_queries: bool = True
    """Whether there may be fewer key/value heads than query heads."""
    free_head_dim: bool = True
    """Whether a head may be wider or narrower than hidden / heads."""
    heads_divide_hidden: bool = False
    """Whether transformers refuses a width that the heads do not divide, whatever head_dim says."""


FamilyName = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"]
"""The keys of `ARCHITECTURES`."""
ARCHITECTURES: dict[FamilyName, ArchitectureSpec] = {
    "llama": ArchitectureSpec(heads_divide_hidden=True),
    "mistral": ArchitectureSpec(),
    "qwen2": ArchitectureSpec(qkv_bias=True, free_head_dim=False),
    "qwen3": ArchitectureSpec(qk_norm=True),
    "gpt2": ArchitectureSpec(
        norm="LayerNorm",
        activation="gelu_tanh",
        gated=False,
        linear_bias=True,
        learned_positions=True,
        grouped_queries=False,
        free_head_dim=False,
    ),
    "gpt_neox": ArchitectureSpec(
        norm="LayerNorm",
        activation="gelu",
        gated=False,
        linear_bias=True,
        partial_rotary=True,
        parallel_residual=True,
        grouped_queries=False,
        free_head_dim=False,
    ),
}
