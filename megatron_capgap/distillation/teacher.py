"""The teacher as an input: it runs forward-only over a global batch and leaves hidden states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_capgap.config.schema import ModelShape
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.models import schedule
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.runtime.layout import Grid


@dataclass(frozen=True)
class Taught:
    """What a teacher leaves of a global batch: hidden states `[s, b, h_teacher]`, `[s/tp, b, h_teacher]` under sequence
    parallelism, for each of the student's micro-batches in turn."""

    final: list[Tensor | None]
    """After the final norm; None for each on other stages than the last."""
    of_layers: dict[int, list[Tensor]]
    """Behind the layers that were asked for, by their numbers, as far as they are on this pipeline stage."""


@dataclass(frozen=True)
class Teacher:
    """A frozen model in its layout."""

    chunks: Sequence[torch.nn.Module]
    """This rank's part, in eval mode, without gradients."""
    grid: Grid
    """Its layout."""
    shape: ModelShape
    """The model in numbers."""
    micro_batch: int
    """Sequences in one forward pass; need not be the student's."""

    def head(self) -> Tensor:
        """The LM head's local shard `[v/tp, h_teacher]`; last stage only."""
        return unwrap(self.chunks[-1]).lm_head()

    def hidden_states(self, batches: Sequence[MicroBatch], layers: Collection[int] = ()) -> Taught:
        """Runs the teacher over this data-parallel rank's part of a global batch. Collective.

        Args:
            batches: the student's micro-batches.
            layers: whose outputs are wanted too, counted from 1.
        """
        kept: list[Tensor] = []
        of_layers = {
            layer: [] for chunk in self.chunks for layer in unwrap(chunk).decoder.layers if layer.layer_number in layers
        }
        hooks = [
            layer.register_forward_hook(lambda module, _, output: of_layers[module].append(output[0]))
            for layer in of_layers
        ]

        def last_stage(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, None]:
            kept.append(hidden)
            return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), None

        own = regroup(batches, self.micro_batch)
        with torch.no_grad():
            shape = (own[0].tokens.shape[1], self.micro_batch)
            schedule.run(self.chunks, self.grid, own, last_stage, forward_only=True, shape=shape)
        for hook in hooks:
            hook.remove()
        rows = [len(batch.tokens) for batch in batches]
        final = _in_rows(kept, rows) if kept else [None] * len(batches)
        return Taught(final, {layer.layer_number: _in_rows(states, rows) for layer, states in of_layers.items()})


def _in_rows(states: list[Tensor], rows: list[int]) -> list[Tensor]:
    """Hidden states `[s, b, h]` of the teacher's micro-batches, cut into the student's of so many rows each."""
    return states if len(states) == len(rows) else list(torch.cat(states, dim=1).split(rows, dim=1))


def freeze(chunks: Sequence[torch.nn.Module]) -> None:
    """Eval mode, no gradients: nothing of the forward pass is kept for a backward one."""
    for chunk in chunks:
        chunk.eval()
        chunk.requires_grad_(False)


def regroup(batches: Sequence[MicroBatch], rows: int) -> Sequence[MicroBatch]:
    """The same samples in the same order, `rows` of them to a micro-batch."""
    if len(batches[0].tokens) == rows:
        return batches
    together = {
        name: torch.cat([getattr(batch, name) for batch in batches]).split(rows)
        for name in ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
        if getattr(batches[0], name) is not None
    }
    ids = [sample for batch in batches for sample in batch.sample_ids]
    return [
        replace(
            batches[0],
            **{name: parts[i] for name, parts in together.items()},
            sample_ids=ids[i * rows : (i + 1) * rows],
        )
        for i in range(len(together["tokens"]))
    ]
