"""adapt: next-token training of a model, from random weights or from a checkpoint."""

from __future__ import annotations

from megatron_capgap.config.load import Loaded
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.launch import Environment
from megatron_capgap.stages import common
from megatron_capgap.training.loop import train


def run(loaded: Loaded, environment: Environment, device: Device) -> int:
    """Trains; returns the exit code."""
    with common.ground(loaded, "adapt", environment, device) as ground:
        train(common.language_model_run(ground))
    return 0
