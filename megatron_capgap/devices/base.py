"""What a device is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Component:
    """One row of the start-up table: a kernel or library that may or may not be in use."""

    name: str
    active: bool
    why: str


@dataclass(frozen=True)
class Device:
    """What the rest of the project needs to know of the device it runs on."""

    name: str
    """cpu or cuda."""
    backend: str
    """torch.distributed backend: gloo or nccl."""
    torch_device: torch.device
    """Where tensors live."""
    default_engine: str
    """Whose layers precision.engine auto means, without FP8: local or transformer_engine."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None on a CPU, whose emulation knows every FP8 recipe."""
    send_keeps_data: bool
    """Whether a tensor may be freed while its asynchronous send is under way: NCCL's stream order allows it, gloo reads
    the freed memory."""
    components: tuple[Component, ...]
    """The start-up table."""
    peak_memory: Callable[[], int]
    """Peak bytes of this process on the device since it started."""
    release_memory: Callable[[], None]
    """Gives memory that the allocator keeps for later back to the system."""
    finish: Callable[[], None]
    """Returns when all work that was given to the device is done."""
    between_steps: Callable[[], None]
    """Called after each step: keeps the memory of a long run what it was in a short one."""
    between_micro_batches: Callable[[], None]
    """Called between micro-batches that no optimizer step follows: what one has freed is no burden to the next."""
    tune_optimizer: Callable[[torch.optim.Optimizer], None]
    """Switches on what this device can fuse in the optimizer Megatron made."""

    def component_table(self) -> tuple[str, tuple[str, ...], list[tuple[str, str, str]]]:
        """The start-up table: which engine and which fused components are in use, and why not; title, header, rows."""
        rows = [(part.name, "yes" if part.active else "no", part.why) for part in self.components]
        return f"device {self.name}, backend {self.backend}", ("part", "in use", ""), rows


def library(name: str, package: str, use: str) -> Component:
    """A table row for an optional library that Megatron-Core picks up by itself where it can be imported."""
    present = importlib.util.find_spec(package) is not None
    return Component(name, present, use if present else f"{package} is not installed; torch's own kernels are used")
