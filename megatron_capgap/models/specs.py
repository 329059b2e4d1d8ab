"""Layer specs: Transformer Engine's modules, or Megatron's local modules with two of this package.

The local modules run on a CPU and on a GPU without Transformer Engine. This package adds an RMSNorm that supports
sequence parallelism (Megatron's wrapper around torch's refuses it), and an attention that materialises no score matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ArchitectureSpec
from megatron_capgap.devices import Device
from megatron_capgap.models.layers import LayerNorm, ParallelResidualLayer, mark_sequence_parallel


class _RMSNormFunction(torch.autograd.Function):
    """x * rstd * gain, with rstd = 1 / sqrt(mean(x^2) + epsilon).

    Saves x, which the residual stream saves anyway, and one number per token. torch's composite implementation also
    saves the normalised x and makes twice as many passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, gain, rstd)
        return (wide * rstd).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, rstd = ctx.saved_tensors
        wide, gradient = x.to(rstd.dtype), gradient.to(rstd.dtype)
        normalised = (wide * rstd).flatten(0, -2)
        gradient = gradient.flatten(0, -2)
        buffer = gradient * normalised
        gain_gradient = buffer.sum(0)
        # d(rstd)/dx contributes -normalised * mean(gradient * gain * normalised).
        projection = torch.mv(buffer, gain.to(buffer.dtype)).div_(-x.shape[-1]).unsqueeze(-1)
        torch.mul(gradient, gain, out=buffer)
        buffer.addcmul_(normalised, projection).mul_(rstd.view(-1, 1))
        return buffer.view_as(x).to(x.dtype), gain_gradient.to(gain.dtype), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, with a gain.

    The gain is replicated over tensor-parallel ranks. Under sequence parallelism each rank processes only its shard of
    the sequence; the attribute `sequence_parallel` makes Megatron sum the gain's gradient over these ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self.weight, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`, computed in fp32 or wider."""
        return _RMSNormFunction.apply(hidden, self.weight, self.epsilon)


_NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention over `[s/cp, b, heads/tp, d]` by torch's scaled_dot_product_attention.

    Under context parallelism each rank has two chunks of the sequence (`derived.context_chunks`). The keys and values
    of all ranks are gathered, as in Llama 3 (arXiv 2407.21783, section 3.3.2), and their gradients reduce-scattered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: object,
    ) -> None:
        super().__init__()
        self.context_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "Megatron's attention passes its process groups on"
            self.context_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        # Each tensor-parallel rank holds different heads, so dropout uses this rank's own random stream. Under sequence
        # parallelism TransformerBlock has forked it already; a second fork is lost when the layer is recomputed.
        self.random_stream = nullcontext if config.sequence_parallel else get_cuda_rng_tracker().fork

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Computes the attention output.

        Args:
            query: `[s/cp, b, heads/tp, d]`, a local shard.
            key, value: `[s/cp, b, kv_heads/tp, d]`, local shards.
            attention_mask: bool `[b, 1, s/cp, s]`, keys in the order of the sequence; True where a query must not
                attend; None selects attn_mask_type.
            attn_mask_type: no_mask for a query after all keys, as with a cache; otherwise causal.
            attention_bias, packed_seq_params: must be None.

        Returns:
            `[s/cp, b, heads/tp * d]`, a local shard.
        """
        assert attention_bias is None and packed_seq_params is None
        seen = None if attention_mask is None else ~attention_mask
        if self.context_group is not None:
            key, value = _gather_keys_and_values(key, value, self.context_group)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = key.shape[1] != query.shape[1]
        causal = seen is None and attn_mask_type is not AttnMaskType.no_mask
        dropout = self.dropout if self.training else 0.0
        if dropout > 0.0:
            with self.random_stream():
                context = self._attend(query, key, value, seen, causal, dropout, grouped)
        else:
            context = self._attend(query, key, value, seen, causal, 0.0, grouped)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor | None,
        causal: bool,
        dropout: float,
        grouped: bool,
    ) -> Tensor:
        """Attention of `[b, heads/tp, s/cp, d]` to keys and values `[b, kv_heads/tp, s, d]`."""
        attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=self.scale, enable_gqa=grouped)
        if self.context_group is None or not causal:
            return attend(query, key, value, attn_mask=seen, is_causal=causal)
        rank, ranks = self.context_group.rank(), self.context_group.size()
        size, parts = query.shape[2] // 2, []
        for part, chunk in zip(query.chunk(2, dim=2), derived.context_chunks(rank, ranks), strict=True):
            stop = (chunk + 1) * size  # no key behind the chunk's own is read
            mask = _lower_right_mask(size, stop, query.dtype, query.device)
            parts.append(attend(part, key[:, :, :stop], value[:, :, :stop], attn_mask=mask))
        return torch.cat(parts, dim=2)


def _gather_keys_and_values(key: Tensor, value: Tensor, group: torch.distributed.ProcessGroup) -> Sequence[Tensor]:
    """Keys and values `[s/cp, b, kv_heads/tp, d]` of all context-parallel ranks, `[s, b, kv_heads/tp, d]` in the order
    of the sequence. One all-gather; one reduce-scatter of their gradients in the backward pass."""
    both = gather_from_sequence_parallel_region(
        torch.cat([key, value], dim=2), tensor_parallel_output_grad=True, group=group
    )
    chunks = both.chunk(2 * group.size())  # of rank 0, then of rank 1, ...: each an early and a late one
    return torch.cat([*chunks[0::2], *chunks[1::2][::-1]]).chunk(2, dim=2)


@lru_cache(maxsize=8)
def _lower_right_mask(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Scores are added to it: 0 where the last `queries` of `keys` tokens attend, otherwise -inf. `[queries, keys]`,
    one for all layers and micro-batches. torch's `is_causal` aligns the first query with the first key instead."""
    mask = torch.full((queries, keys), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(keys - queries + 1)


def _local_layer(traits: ArchitectureSpec) -> ModuleSpec:
    """One pre-norm transformer layer of Megatron's local modules."""
    norm = _NORMS[traits.norm]
    qk_norm = RMSNorm if traits.qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ScaledDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=_layer_class(traits),
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # Checkpoints use Transformer Engine's keys, where the norm is part of the linear that follows it.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _engine_layer(traits: ArchitectureSpec, own_attention: bool) -> ModuleSpec:
    """One layer of Transformer Engine's modules; its attention needs a GPU."""
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=traits.qk_norm)
    layer.module = _layer_class(traits)
    if own_attention:
        layer.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    return layer


def _layer_class(traits: ArchitectureSpec) -> type[TransformerLayer]:
    return ParallelResidualLayer if traits.parallel_residual else TransformerLayer


def block(
    config: TransformerConfig,
    engine: str,
    device: Device,
    chunk: int | None,
    pipeline_rank: int,
    traits: ArchitectureSpec,
    *,
    use_attention_mask: bool,
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of one model chunk.

    Args:
        config: Megatron's transformer configuration.
        engine: local or transformer_engine.
        device: the device the model runs on.
        chunk: virtual stage, or None without virtual stages.
        pipeline_rank: this rank's stage.
        traits: the properties of the model's family.
        use_attention_mask: whether forward passes get an attention mask; Transformer Engine's causal attention would
            ignore it.
    """
    if engine == "transformer_engine":
        # Transformer Engine has no attention in fp32 under context parallelism.
        fp32_context = config.context_parallel_size > 1 and config.params_dtype is torch.float32
        return _engine_layer(traits, own_attention=device.name == "cpu" or use_attention_mask or fp32_context)
    layers = get_num_layers_to_build(config, chunk, pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[_local_layer(traits)] * layers, layer_norm=_NORMS[traits.norm])
