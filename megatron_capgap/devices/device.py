"""What a device is, and which one this rank takes."""

from __future__ import annotations

import importlib.util
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.schema import Precision
from megatron_capgap.runtime import releases


@dataclass(frozen=True)
class Component:
    """One row of the start-up table: a kernel or library that may or may not be in use."""

    name: str
    active: bool
    why: str


@dataclass(frozen=True)
class Device:
    """What the rest of the project needs to know of the ground it runs on."""

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


def choose(name: str, local_rank: int, precisions: Sequence[Precision] = (), place: str = "--device") -> Device:
    """Picks and prepares the device of this rank, and checks the Megatron-Core version first.

    To be called before anything imports Megatron-Core, which at its import decides what it compiles and whether
    Transformer Engine is there.

    Args:
        name: auto, cpu or cuda; auto takes cuda where any GPU is visible.
        local_rank: this rank's number on its node.
        precisions: the arithmetic of each model.
        place: where the name was said, for messages.

    Raises:
        UserError: cuda or Transformer Engine was asked for and is not there, or megatron-core is outside the tested
            range.
    """
    if complaint := releases.complaint(releases.megatron()):
        raise UserError(complaint)
    device = _prepare(name, local_rank, precisions, place)
    _save_in_this_process()
    return device


def _prepare(name: str, local_rank: int, precisions: Sequence[Precision], place: str) -> Device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A launcher may show each rank its own GPU alone.
    index = 0 if gpus == 1 else local_rank
    if name == "cuda" or (name == "auto" and gpus > 0):
        if gpus == 0:
            raise UserError(f"{place}: {name}, but there is no GPU that torch could use here; cpu would do")
        if gpus <= index:
            raise UserError(
                f"{place}: {name}, but rank {local_rank} of this node sees {gpus} GPUs; "
                f"cpu would do, or at most {gpus} ranks a node"
            )
        from megatron_capgap.devices import cuda

        return cuda.prepare(index, precisions)
    from megatron_capgap.devices import cpu

    return cpu.prepare(any(derived.engine(wanted, "local") == "transformer_engine" for wanted in precisions))


def _save_in_this_process() -> None:
    """Gives Megatron's checkpoint writer a queue for its results.

    It would start a server process on every rank, to hand them over from an asynchronous save, and a killed rank would
    leave that process behind; here the rank itself saves.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def library(name: str, package: str, use: str) -> Component:
    """A table row for an optional library that Megatron-Core picks up by itself where it can be imported."""
    present = importlib.util.find_spec(package) is not None
    return Component(name, present, use if present else f"{package} is not installed; torch's own kernels are used")
