"""The interface of a device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

Span = Callable[[str], AbstractContextManager[Any]]
"""Takes the name of a range of work; returns a context manager around it."""


@dataclass(frozen=True)
class Component:
    """One row of the start-up table: a kernel or library that may or may not be in use."""

    name: str
    active: bool
    why: str


@dataclass(frozen=True)
class Device:
    """Properties and functions of the device that a rank runs on."""

    name: str
    """cpu or cuda."""
    backend: str
    """torch.distributed backend: gloo or nccl."""
    torch_device: torch.device
    """The torch device of tensors."""
    default_engine: str
    """The engine that precision.engine auto selects without FP8: local or transformer_engine."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None on a CPU, whose emulation supports every FP8 recipe."""
    send_keeps_data: bool
    """Whether a tensor may be freed during its asynchronous send: NCCL's stream order allows it, gloo would read freed
    memory."""
    components: tuple[Component, ...]
    """The start-up table."""
    peak_memory: Callable[[], int]
    """Peak bytes of this process on the device since it started."""
    release_memory: Callable[[], None]
    """Returns memory cached by the allocator to the system."""
    upload: Callable[[torch.Tensor], torch.Tensor]
    """Copies a tensor in host memory to the device. The process does not wait for the copy, the device's work does."""
    mark: Callable[[], Any]
    """Marks the point that the submitted work has reached; see `seconds_between`."""
    seconds_between: Callable[[Any, Any], float]
    """Seconds that the device took from one mark to a later one, which it must have reached."""
    between_steps: Callable[[], None]
    """Called after each step: prevents memory growth over a long run."""
    between_micro_batches: Callable[[], None]
    """Called between micro-batches without an optimizer step: returns freed memory before the next one."""
    tune_optimizer: Callable[[torch.optim.Optimizer], None]
    """Enables the fused kernels that this device supports in Megatron's optimizer."""
    span: Span
    """Names a range of this process's work in profiles: of torch's profiler while it records, and on a GPU of nsys."""
    profiler_activities: tuple[ProfilerActivity, ...]
    """What torch's profiler records here."""

    def component_table(self) -> tuple[str, tuple[str, ...], list[tuple[str, str, str]]]:
        """The start-up table (title, header, rows): engine and fused components in use, or the reason why not."""
        rows = [(part.name, "yes" if part.active else "no", part.why) for part in self.components]
        return f"device {self.name}, backend {self.backend}", ("part", "in use", ""), rows


def recorded_span(name: str) -> AbstractContextManager[Any]:
    """A range in the trace of torch's profiler while it records; otherwise nothing."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


def fuse_adam(optimizer: torch.optim.Optimizer) -> None:
    """Enables the fused kernel of torch's AdamW, which reads and writes each parameter once; Megatron does not.

    Without Transformer Engine and Apex Megatron takes torch's AdamW, on any device.
    """
    for group in optimizer.param_groups:
        group["fused"] = True
        group["foreach"] = False


def library(name: str, package: str, use: str) -> Component:
    """A table row for an optional library that Megatron-Core uses if it can be imported."""
    present = importlib.util.find_spec(package) is not None
    return Component(name, present, use if present else f"{package} is not installed; torch's own kernels are used")
