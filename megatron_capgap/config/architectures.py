"""Architecture table: the properties that a family fixes, one row per family.

Properties that vary within a family are fields of `schema.ModelShape`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ArchitectureSpec:
    """Components of a decoder layer; all families are pre-norm. The defaults are LLaMA's."""

    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Type of all norms, except the query and key norms, which are RMSNorm."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Activation of the feed-forward layer; gelu_tanh is the tanh approximation of GELU."""
    gated: bool = True
    """Whether the feed-forward layer has a gate projection in addition to the up projection."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    linear_bias: bool = False
    """Whether every projection of a layer has a bias."""
    qk_norm: bool = False
    """Whether each head's query and key are normalised before the rotary embedding."""
    learned_positions: bool = False
    """Whether positions are learned embeddings; otherwise rotary."""
    partial_rotary: bool = False
    """Whether only a fraction of each head's channels may be rotated."""
    parallel_residual: bool = False
    """Whether the feed-forward layer reads the layer's input, in parallel with attention."""
    grouped_queries: bool = True
    """Whether there may be fewer key/value heads than query heads."""
    free_head_dim: bool = True
    """Whether head_dim may differ from hidden / heads."""
    heads_divide_hidden: bool = False
    """Whether transformers requires that heads divides hidden, even if head_dim is set."""


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
