"""finetune: a model learns the assistant's words of conversations, by itself or from a teacher."""

from __future__ import annotations

from megatron_capgap.config.load import Loaded
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.launch import Environment
from megatron_capgap.stages import common, distill
from megatron_capgap.training.loop import train


def run(loaded: Loaded, environment: Environment, device: Device) -> int:
    """Finetunes; returns the exit code."""
    with common.ground(loaded, "finetune", environment, device) as ground:
        if ground.config.teacher is None:
            train(common.language_model_run(ground))
        else:
            train(distill.taught_in_turns(ground))
    return 0
