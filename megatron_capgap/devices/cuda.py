"""CUDA device: NCCL, with Transformer Engine and Apex's kernels if they can be imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity

from megatron_capgap.common.errors import UserError, not_installed
from megatron_capgap.config import derived
from megatron_capgap.config.schema import Precision
from megatron_capgap.devices.base import Component, Device, fuse_adam, library, recorded_span


def prepare(local_rank: int, precisions: Sequence[Precision]) -> Device:
    """Selects this rank's GPU; the component table lists what Megatron-Core finds of Apex and Transformer Engine.

    Raises:
        UserError: a model needs Transformer Engine, which is not installed.
    """
    torch.cuda.set_device(local_rank)
    installed = importlib.util.find_spec("transformer_engine") is not None
    default = "transformer_engine" if installed else "local"
    engines = {derived.engine(precision, default) for precision in precisions}
    if "transformer_engine" in engines and not installed:
        reason = not_installed("transformer_engine", "fp8")
        raise UserError(f"precision.engine: {reason}, or set engine: local and remove fp8")
    used = "transformer_engine" in engines
    absent = "not asked for" if installed else "transformer_engine is not installed"
    return Device(
        name="cuda",
        backend="nccl",
        torch_device=torch.device("cuda", local_rank),
        default_engine=default,
        capability=torch.cuda.get_device_capability(local_rank),
        send_keeps_data=True,
        components=(
            Component("Transformer Engine layers", used, "fused norms, linears and attention" if used else absent),
            Component(
                "scaled-dot-product attention",
                "local" in engines,
                "torch" if "local" in engines else "Transformer Engine's own is used",
            ),
            library("fused loss: Triton kernels", "triton", "the passes over logits of both models"),
            library(
                "Apex fused weight gradient",
                "fused_weight_gradient_mlp_cuda",
                "gradients accumulate in fp32 inside the GEMM",
            ),
            library("Apex fused Adam", "apex", "used where Transformer Engine's is absent"),
        ),
        peak_memory=torch.cuda.max_memory_allocated,
        release_memory=torch.cuda.empty_cache,
        # pin_memory keeps strides, and cannot fill a tensor that overlaps itself, such as an expanded one.
        upload=lambda tensor: tensor.contiguous().pin_memory().to(torch.device("cuda", local_rank), non_blocking=True),
        mark=_mark,
        seconds_between=lambda begin, end: begin.elapsed_time(end) / 1e3,
        between_steps=lambda: None,
        between_micro_batches=lambda: None,
        tune_optimizer=fuse_adam,
        span=_span,
        profiler_activities=(ProfilerActivity.CPU, ProfilerActivity.CUDA),
    )


@contextmanager
def _span(name: str) -> Iterator[None]:
    """An NVTX range, which nsys shows; it costs less than a microsecond where nothing records it."""
    torch.cuda.nvtx.range_push(name)
    try:
        with recorded_span(name):
            yield
    finally:
        torch.cuda.nvtx.range_pop()


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
