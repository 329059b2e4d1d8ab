"""Megatron-Core at home: NCCL, Transformer Engine where importable, Apex's kernels where importable."""

from __future__ import annotations

import importlib.util

import torch

from megatron_capgap.runtime.devices.device import Device, Part, library


def prepare(local_rank: int) -> Device:
    """Takes this rank's GPU; the table says what Megatron-Core finds of Apex and Transformer Engine."""
    torch.cuda.set_device(local_rank)
    with_engine = importlib.util.find_spec("transformer_engine") is not None
    engine = "transformer_engine" if with_engine else "local"
    why = "fused norms, linears and attention" if with_engine else "transformer_engine is not installed"
    return Device(
        name="cuda",
        backend="nccl",
        torch_device=torch.device("cuda", local_rank),
        engine=engine,
        send_keeps_data=True,
        parts=(
            Part("Transformer Engine layers", with_engine, why),
            Part(
                "scaled-dot-product attention",
                not with_engine,
                "torch" if not with_engine else "Transformer Engine's own is used",
            ),
            library(
                "Apex fused weight gradient",
                "fused_weight_gradient_mlp_cuda",
                "gradients accumulate in fp32 inside the GEMM",
            ),
            library("Apex fused Adam", "apex", "used where Transformer Engine's is absent"),
        ),
        peak_memory=torch.cuda.max_memory_allocated,
        release_memory=torch.cuda.empty_cache,
        tune_optimizer=lambda optimizer: None,
    )
