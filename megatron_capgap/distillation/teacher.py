"""The teacher as an input: it runs forward-only over a global batch and leaves its final hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_capgap.config.schema import ModelShape
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.models import schedule
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.runtime.layout import Grid


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

    def hidden_states(self, batches: Sequence[MicroBatch]) -> list[Tensor | None]:
        """Runs the teacher over this data-parallel rank's part of a global batch. Collective.

        Args:
            batches: the student's micro-batches.

        Returns:
            For each of them the hidden states after the final norm, `[s, b, h_teacher]` or `[s/tp, b, h_teacher]` under
            sequence parallelism, on the last stage; None for each on other stages.
        """
        kept: list[Tensor] = []

        def last_stage(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, None]:
            kept.append(hidden)
            return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), None

        own = regroup(batches, self.micro_batch)
        with torch.no_grad():
            shape = (own[0].tokens.shape[1], self.micro_batch)
            schedule.run(self.chunks, self.grid, own, last_stage, forward_only=True, shape=shape)
        if not kept:
            return [None] * len(batches)
        if len(kept) == len(batches):
            return list(kept)
        return list(torch.cat(kept, dim=1).split([len(batch.tokens) for batch in batches], dim=1))


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
        for name in ("tokens", "labels", "loss_mask", "position_ids")
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
