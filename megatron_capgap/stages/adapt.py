"""adapt: next-token training of a model, from random weights or from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_capgap.config.load import Loaded
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.losses import Loss, language_model_loss
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.launch import Environment
from megatron_capgap.stages import common
from megatron_capgap.training.loop import train
from megatron_capgap.training.step import LossFunction


def run(loaded: Loaded, environment: Environment, device: Device) -> int:
    """Trains; returns the exit code."""
    with common.ground(loaded, "adapt", environment, device) as ground:
        vocab_size, grid = ground.resolved.student.vocab, ground.grid

        def loss(hidden: Tensor, head: Tensor, batch: MicroBatch) -> Loss:
            return language_model_loss(
                hidden.flatten(0, 1),
                head,
                *batch.flat(),
                vocab_size=vocab_size,
                group=grid.groups.tp,
                sequence_parallel=grid.layout.sequence,
            )

        def prepare(batches: Sequence[MicroBatch]) -> LossFunction:
            return loss

        train(common.training_run(ground, common.student_chunks(ground), prepare))
    return 0
