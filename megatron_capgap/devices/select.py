"""Selects and prepares this rank's device."""

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
    """Checks the Megatron-Core version, then selects and prepares this rank's device.

    Call it before anything imports Megatron-Core, which decides at import what it compiles and whether Transformer
    Engine is available.

    Args:
        name: auto, cpu or cuda; auto selects cuda if any GPU is visible.
        local_rank: this rank's number on its node.
        precisions: the precision of each model.
        place: where the name was given, for messages.

    Raises:
        UserError: cuda or Transformer Engine is requested but not available, or megatron-core is outside the tested
            range.
    """
    if complaint := releases.complaint(releases.megatron()):
        raise UserError(complaint)
    device = _prepare(name, local_rank, precisions, place)
    _save_in_this_process()
    return device


def _prepare(name: str, local_rank: int, precisions: Sequence[Precision], place: str) -> Device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A launcher may make only the rank's own GPU visible to it.
    index = 0 if gpus == 1 else local_rank
    if name == "cuda" or (name == "auto" and gpus > 0):
        if gpus == 0:
            raise UserError(f"{place}: {name}, but torch finds no usable GPU; use cpu")
        if gpus <= index:
            raise UserError(
                f"{place}: {name}, but rank {local_rank} of this node sees {gpus} GPUs; "
                f"use cpu, or at most {gpus} ranks per node"
            )
        return cuda.prepare(index, precisions)
    return cpu.prepare(any(derived.engine(wanted, "local") == "transformer_engine" for wanted in precisions))


def _save_in_this_process() -> None:
    """Gives Megatron's checkpoint writer an in-process queue for its results.

    By default it starts a server process on every rank to receive them from an asynchronous save, which a killed rank
    would leave behind. Here the rank itself saves.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
