"""The teacher's forward pass over a global batch, in its own layout; yields hidden states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_capgap.config.schema import ModelShape
from megatron_capgap.data.batch import MicroBatch, TokenDataset, read_micro_batch
from megatron_capgap.distillation.transfer import States, split_by_sample
from megatron_capgap.distillation.transfer_plan import FINAL_HIDDEN
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models import pipeline_schedule
from megatron_capgap.models.gpt import unwrap


@dataclass(frozen=True)
class FrozenTeacher:
    """A frozen model in its layout, without its LM head."""

    chunks: Sequence[torch.nn.Module]
    """This rank's model chunks, in eval mode, without gradients."""
    parallel: ParallelContext
    """Its layout."""
    shape: ModelShape
    """The model's sizes."""
    micro_batch: int
    """Sequences in one forward pass; may differ from the student's."""
    sample_ids: Sequence[int]
    """The samples of a global batch, counted from 0, that this data-parallel rank processes."""
    weights: AbstractContextManager[None]
    """Context of a forward pass: moves the weights to the device."""

    def micro_batches(self, dataset: TokenDataset, first_sample: int, device: torch.device) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches of the global batch that starts with sample `first_sample`."""
        ids = [first_sample + sample for sample in self.sample_ids]
        starts = range(0, len(ids), self.micro_batch)
        return [read_micro_batch(dataset, ids[start : start + self.micro_batch], device) for start in starts]

    def forward(self, batches: Sequence[MicroBatch], layers: Collection[int] = ()) -> States:
        """Runs the teacher over this data-parallel rank's part of a global batch. Collective over the teacher's ranks.

        Args:
            batches: its micro-batches.
            layers: layers whose outputs are also returned, counted from 1.

        Returns:
            The hidden states on this rank, per stream and sample `[s, h_teacher]`, or `[s/tp, h_teacher]` under
            sequence parallelism (s/cp in place of s under context parallelism): the stream `FINAL_HIDDEN` (after the
            final norm) on the last stage, those of layers on the layers' stages.
        """
        found: States = {}
        hooks = [
            layer.register_forward_hook(
                partial(_collect_hidden, found.setdefault(layer.layer_number, {}), iter(batches))
            )
            for chunk in self.chunks
            for layer in unwrap(chunk).decoder.layers
            if layer.layer_number in layers
        ]

        def last_stage(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, None]:
            found.setdefault(FINAL_HIDDEN, {}).update(split_by_sample(hidden, batch.sample_ids))
            return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), None

        with torch.no_grad(), self.parallel.activate(), self.weights:
            shape = (batches[0].tokens.shape[1], self.micro_batch)
            pipeline_schedule.run(self.chunks, self.parallel, batches, last_stage, forward_only=True, shape=shape)
        for hook in hooks:
            hook.remove()
        return found


def _collect_hidden(
    states: dict[int, Tensor], batches: Any, layer: torch.nn.Module, _: Any, output: tuple[Tensor, Any]
) -> None:
    """A layer's forward hook. Schedules run the micro-batches in order, so an iterator identifies the current one."""
    states.update(split_by_sample(output[0], next(batches).sample_ids))


def freeze(chunks: Sequence[torch.nn.Module]) -> None:
    """Sets eval mode and disables gradients, so that a forward pass saves nothing for a backward pass."""
    for chunk in chunks:
        chunk.eval()
        chunk.requires_grad_(False)
