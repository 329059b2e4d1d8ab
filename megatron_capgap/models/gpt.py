"""Builds Megatron-Core model chunks from a shape, a layout and a device."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.schema import FP8, Layout, ModelShape, Precision, RopeScaling
from megatron_capgap.devices import Device
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models import size, specs
from megatron_capgap.runtime import releases

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HiddenStateModel(GPTModel):
    """Megatron's GPT, but the last stage returns its final hidden states; the loss applies the LM head.

    `forward(tokens [b, s], position_ids [b, s], attention_mask=None)` returns the hidden states `[s, b, h]`, or
    `[s/tp, b, h]` under sequence parallelism, on every stage; on the last stage after the final norm.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.projections = torch.nn.ModuleDict()
        """Trained and saved with the model, but not part of it: see `models.projections`."""

    def _postprocess(self, hidden_states: Tensor, **unused: object) -> Tensor:
        # GPTModel has no argument to skip the output layer; this is the method that applies it.
        return hidden_states

    def lm_head(self) -> Tensor:
        """The LM head's local shard `[v/tp, h]`; last stage only. With tied embeddings, the shared weight."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def unwrap(model: torch.nn.Module) -> HiddenStateModel:
    """The model inside DistributedDataParallel."""
    while not isinstance(model, HiddenStateModel):
        inner = model.module
        assert isinstance(inner, torch.nn.Module), "what wraps a model holds a module"
        model = inner
    return model


def transformer_config(
    shape: ModelShape,
    layout: Layout,
    precision: Precision,
    device: Device,
    dropout: float = 0.0,
    recompute: Recompute | None = None,
) -> TransformerConfig:
    """Megatron's TransformerConfig for a shape, layout, precision and device."""
    dtype = DTYPES[precision.compute]
    engine = derived.engine(precision, device.default_engine)
    traits = ARCHITECTURES[shape.family]
    return TransformerConfig(
        **_fp8(precision.fp8),
        **_recompute(recompute),
        **releases.no_cuda_graphs(),
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=derived.kv_heads(shape),
        kv_channels=derived.head_dim(shape),
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=traits.gated,
        activation_func=_ACTIVATIONS[traits.activation],
        normalization=traits.norm,
        layernorm_epsilon=shape.norm_epsilon,
        add_bias_linear=traits.linear_bias,
        add_qkv_bias=traits.qkv_bias,
        qk_layernorm=traits.qk_norm,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(layout),
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=precision.compute == "bf16",
        # `initialise` or a checkpoint fills the weights; Megatron's own initialisation depends on the layout.
        use_cpu_initialization=True,
        perform_initialization=False,
        # The loss is a sum over tokens; Megatron divides gradients once, by the global number of valid tokens.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=device.send_keeps_data or layout.virtual_pipeline == 1,
        # With two pipeline ranks the next stage is also the previous one. Batched sends and receives are matched by
        # order only, so an interleaved schedule would silently receive gradients as activations.
        batch_p2p_comm=layout.virtual_pipeline == 1,
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        # By default Megatron waits for the whole GPU after each batched exchange, for the sake of PyTorch before 2.0.
        batch_p2p_sync=False,
        # Fused SwiGLU saves only its input and recomputes the rest, on any device. Megatron's fused GELU is the tanh
        # approximation for both GELU variants.
        bias_activation_fusion=traits.gated,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=_active(device, "Apex fused weight gradient"),
        apply_rope_fusion=engine == "transformer_engine" or device.name == "cpu",
    )


def _fp8(fp8: FP8 | None) -> dict[str, object]:
    """Megatron's FP8 arguments; Megatron enters Transformer Engine's FP8 context around each block or layer.

    FP8 parameters are created after the model is built: see `fp8_weights`.
    """
    if fp8 is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax_algorithm,
        "first_last_layers_bf16": fp8.first_last_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.first_last_layers_bf16,
    }


def _pipeline_layout(layout: Layout) -> list[list[str]] | None:
    """Megatron's description of a pipeline with unequal stages; None for equal ones."""
    if layout.stage_layers is None or layout.pipeline == 1:
        return None
    stages = [["decoder"] * count for count in layout.stage_layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _recompute(wanted: Recompute | None) -> dict[str, object]:
    """Megatron's arguments for activation recomputation."""
    if wanted is None:
        return {}
    if wanted.what == "mlp":
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    if wanted.layers is not None:
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": wanted.layers}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": wanted.every}


def build(
    shape: ModelShape,
    parallel: ParallelContext,
    precision: Precision,
    device: Device,
    *,
    sequence_length: int,
    dropout: float = 0.0,
    recompute: Recompute | None = None,
    virtual: bool = True,
    lm_head: bool = True,
    use_attention_mask: bool = False,
) -> list[torch.nn.Module]:
    """Builds this rank's model chunks: one, or one per virtual stage. Weights are not initialised.

    Args:
        shape: the model's sizes.
        parallel: the layout and this rank's place in it.
        precision: dtype of weights and activations.
        device: device of the weights.
        sequence_length: longest sequence.
        dropout: rate in attention and residual branches.
        recompute: activation recomputation in training mode.
        virtual: False builds the model without virtual stages whatever the layout says (a teacher needs none).
        lm_head: False builds the last stage without its LM head; it still ends with the final norm.
        use_attention_mask: whether forward passes get an attention mask.
    """
    layout = parallel.layout if virtual else Layout(**{**vars(parallel.layout), "virtual_pipeline": 1})
    config = transformer_config(shape, layout, precision, device, dropout, recompute)
    engine = derived.engine(precision, device.default_engine)
    traits = ARCHITECTURES[shape.family]
    chunks: list[torch.nn.Module] = []
    block = partial(specs.block, config, engine, device, use_attention_mask=use_attention_mask)
    for chunk in range(layout.virtual_pipeline):
        stage = chunk if layout.virtual_pipeline > 1 else None
        model = HiddenStateModel(
            config=config,
            transformer_layer_spec=block(stage, parallel.pp_rank, traits),
            vocab_size=size.padded_vocab(shape.vocab, layout.tensor),
            max_sequence_length=(shape.max_positions if traits.learned_positions else None) or sequence_length,
            pre_process=parallel.is_first_stage and chunk == 0,
            post_process=parallel.is_last_stage and chunk == layout.virtual_pipeline - 1,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="learned_absolute" if traits.learned_positions else "rope",
            rotary_base=shape.rope_theta,
            rotary_percent=shape.rotary_share,
            pg_collection=parallel.groups,
            vp_stage=stage,
        )
        _scale_rotary(model, shape.rope_scaling)
        _type_positions(model)
        _mark_shards(model)
        if not lm_head:
            _drop_head(model)
        model.to(device.torch_device)
        # No Float16Module around it: params_dtype makes the weights bf16, and the loss takes bf16 hidden states.
        chunks.append(model)
    return chunks


def _scale_rotary(model: GPTModel, scaling: RopeScaling | None) -> None:
    """Applies RoPE scaling to the rotary frequencies; GPTModel's own argument for it takes only the factor."""
    if scaling is None:
        return
    rotary = model.rotary_pos_emb
    if scaling.kind == "linear":
        rotary.inv_freq = rotary.inv_freq / scaling.factor
    else:
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_frequency_factor,
            high_freq_factor=scaling.high_frequency_factor,
            original_max_position_embeddings=scaling.original_max_positions,
        )


def _type_positions(model: GPTModel) -> None:
    """Casts learned positions to the dtype of the other weights, which Megatron leaves to Float16Module."""
    if model.pre_process and model.embedding.add_position_embedding:
        model.embedding.position_embeddings.to(model.config.params_dtype)


def _drop_head(model: GPTModel) -> None:
    """Removes the LM head from a last stage; tied weights are kept where they embed the input."""
    if model.post_process:
        del model.output_layer
    # The remaining attributes concern the head only: its checkpoint entry, and the weight it is tied to.
    model.post_process = model.share_embeddings_and_output_weights = False


def _mark_shards(model: torch.nn.Module) -> None:
    """Marks the dimension along which each weight is sharded, as Megatron's own initialisation does.

    Gradient norms count unmarked parameters as replicated: once for all tensor-parallel ranks.
    """
    for module in model.modules():
        if (
            isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear)
            and module.weight is not None
        ):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            releases.mark_shard(module.weight, dim)


def init_std(name: str, shape: ModelShape) -> float | None:
    """Standard deviation of a parameter's initial values; None for gains, which start at 1; 0 for biases.

    For projections into the residual stream it is divided by sqrt(2 * layers), as in GPT-2 and Megatron-LM.

    Args:
        name: the parameter's key in the sharded checkpoint.
    """
    if name.endswith(("layernorm.weight", "layer_norm_weight")):
        return None
    if name.endswith("bias"):
        return 0.0
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return shape.init_std / math.sqrt(2.0 * shape.layers)
    return shape.init_std


def _active(device: Device, part: str) -> bool:
    return any(row.active for row in device.components if row.name == part)
