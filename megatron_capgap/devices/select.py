"""Which device this rank takes."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import torch

from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.schema import Precision
from megatron_capgap.devices import cpu, cuda
from megatron_capgap.devices.base import Device
from megatron_capgap.runtime import releases


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
        return cuda.prepare(index, precisions)
    return cpu.prepare(any(derived.engine(wanted, "local") == "transformer_engine" for wanted in precisions))


def _save_in_this_process() -> None:
    """Gives Megatron's checkpoint writer a queue for its results.

    It would start a server process on every rank, to hand them over from an asynchronous save, and a killed rank would
    leave that process behind; here the rank itself saves.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
