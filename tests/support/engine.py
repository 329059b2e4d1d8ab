"""Megatron GPTs of Transformer Engine's layers on the CPU, trained for a few steps; to be run in fresh workers.

Nothing of Megatron may be imported before `start`: it looks for Transformer Engine as it is imported.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megatron_capgap.devices.transformer_engine_cpu import files

needs_files = pytest.mark.skipif(
    files.installed() is None,
    reason="Transformer Engine's Python files are not installed; tools/install_transformer_engine_cpu.py installs them",
)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def start() -> None:
    """Transformer Engine and Megatron-Core on this worker's CPU."""
    from megatron_capgap.devices import cpu, transformer_engine_cpu

    cpu.prepare(with_engine=True)
    transformer_engine_cpu.reset_counts()


def run_counted(words: list[str]) -> tuple[int, dict[tuple[str, str, str], int]]:
    """Runs a stage; its exit code, and the products of this worker by part and formats."""
    start()
    from megatron_capgap.cli import main
    from megatron_capgap.devices.transformer_engine_cpu import counts

    code = main(words)
    return code, {tuple(gemm): times for gemm, times in counts().items()}


@dataclass(frozen=True)
class Case:
    """One training run."""

    recipe: str | None = None
    format: str = "hybrid"
    bf16: bool = False
    tensor: int = 1
    """Tensor-parallel ranks, with sequence parallelism where there are several."""
    steps: int = 3
    micro_batches: int = 2
    normalization: str = "RMSNorm"
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron's TransformerConfig."""


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of it."""

    losses: list[float]
    gemms: dict[tuple[str, str, str], int]
    """Products by part and formats, over all steps."""
    scales: dict[str, list[float]]
    """Delayed scaling: scales of each module, forward then backward."""


# Every shard's dimensions are multiples of 128, with two ranks as with one: tiles of any recipe fall alike.
LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB, SEQUENCE, BATCH = 2, 256, 4, 2, 256, 256, 128, 2


def train(case: Case) -> Outcome:
    """Trains on a fixed batch, with AdamW; every layout starts from the same weights and sees the same tokens."""
    start()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_capgap.devices.transformer_engine_cpu import counts

    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=case.tensor)
    model_parallel_cuda_manual_seed(1)
    model = build(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (case.micro_batches, BATCH, SEQUENCE + 1), generator=generator)
    losses = []
    for _ in range(case.steps):
        model.set_is_first_microbatch()
        total = 0.0
        for rows in tokens:
            loss = loss_of(model, rows) / case.micro_batches
            loss.backward()
            total += loss.item()
        add_up_sequence_parallel(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Outcome(losses, {tuple(gemm): n for gemm, n in counts().items()}, dict(delayed_scales(model)))


def build(case: Case) -> torch.nn.Module:
    """The model, with weights that depend on their names alone."""
    import torch.nn.functional as F
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_capgap.models.specs import ScaledDotProductAttention

    dtype = torch.bfloat16 if case.bf16 else torch.float32
    fp8 = {} if case.recipe is None else {"fp8": case.format, "fp8_recipe": case.recipe}
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        ffn_hidden_size=FFN,
        normalization=case.normalization,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=case.bf16,
        tensor_model_parallel_size=case.tensor,
        sequence_parallel=case.tensor > 1,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **{**fp8, **case.options},
    )
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    for name, parameter in model.named_parameters():
        fill(name, parameter, case.tensor)
    return model


def fill(name: str, parameter: torch.nn.Parameter, tensor: int) -> None:
    """This rank's shard of a matrix of normal numbers; gains start at 1, biases at 0."""
    from megatron.core import parallel_state

    if parameter.ndim == 1:
        torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        return
    rank = parallel_state.get_tensor_model_parallel_rank()
    dim = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    shape = list(parameter.shape)
    shape[dim] *= tensor
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    # A gated projection holds two matrices, each of which is cut.
    parts = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)
    with torch.no_grad():
        parameter.copy_(torch.cat([part.chunk(tensor, dim)[rank] for part in parts]))


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens of `[b, s + 1]`."""
    positions = torch.arange(SEQUENCE).expand(len(rows), -1)
    return model(rows[:, :-1], positions, None, labels=rows[:, 1:]).float().mean()


def add_up_sequence_parallel(model: torch.nn.Module) -> None:
    """Gains see a part of the sequence each; their gradients are added up over tensor-parallel ranks."""
    from megatron.core import parallel_state

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())


def delayed_scales(model: torch.nn.Module) -> Iterator[tuple[str, list[float]]]:
    """Scales of input, weight and output's gradient of every module that delays them."""
    for name, module in model.named_modules():
        state = getattr(module, "fp8_meta", {})
        if "scaling_fwd" in state and hasattr(state["scaling_fwd"], "scale"):
            forward, backward = state["scaling_fwd"].scale.tolist(), state["scaling_bwd"].scale.tolist()
            yield name, [forward[0], forward[1], backward[0]]


@dataclass(frozen=True)
class Held:
    """A weight that lives in FP8 after some steps, and this rank's slice of its master."""

    codes: torch.Tensor
    """`[h, w]`, uint8."""
    inverse: torch.Tensor
    start: int
    """Where the slice begins in the flattened weight."""
    master: torch.Tensor
    """`[n]`, fp32; empty where other ranks hold it all."""


def train_distributed(recipe: str, in_fp8: bool) -> tuple[list[float], dict[str, Held]]:
    """Steps of Megatron's distributed optimizer over all ranks, with weights in bf16 or in FP8."""
    start()
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model = build(Case(recipe, bf16=True, options={"fp8_param": True} if in_fp8 else {}))
    exact = dict(build(Case(bf16=True)).named_parameters())
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "get_high_precision_init_val"):
            # Masters begin with what construction left here, not with what the weight was set to later.
            parameter.get_high_precision_init_val().copy_(exact[name].detach())
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, fp8_param_gather=in_fp8
    )
    ddp = DistributedDataParallel(config=model.config, ddp_config=ddp_config, module=model)
    settings = {"bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True, "fp8_recipe": recipe}
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.0, **settings), [ddp])
    generator = torch.Generator().manual_seed(5 + torch.distributed.get_rank())
    rows = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    losses = []
    for _ in range(4):
        model.set_is_first_microbatch()
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = loss_of(ddp, rows)
        loss.backward()
        ddp.finish_grad_sync()
        optimizer.step()
        losses.append(loss.item())
    (inner,) = optimizer.chained_optimizers
    held = {}
    for name, parameter in model.named_parameters():
        if in_fp8 and name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            codes, inverse = (
                ("_data", "_scale_inv") if recipe != "blockwise" else ("_rowwise_data", "_rowwise_scale_inv")
            )
            main = getattr(parameter, "main_param", None)
            here = inner._get_model_param_range_map(parameter)["param"].start if main is not None else 0
            parts = getattr(parameter, codes).clone(), getattr(parameter, inverse).clone()
            held[name] = Held(*parts, here, torch.empty(0) if main is None else main.detach().clone())
    return losses, held
