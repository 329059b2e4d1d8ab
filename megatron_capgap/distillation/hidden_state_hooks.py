"""Hidden-state matching through forward hooks on the student's layers, independent of the pipeline schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_capgap.config.schema import LayerPair
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.distillation.transfer import TeacherStates
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.losses import Loss
from megatron_capgap.losses.hidden_matching import match
from megatron_capgap.models import projections
from megatron_capgap.models.gpt import unwrap


class HiddenStateMatching:
    """Hooks for the run's matched layer pairs whose student layer is on this pipeline stage.

    Args:
        chunks: the student's model chunks on this rank, with their projections.
        parallel: its layout.
        pairs: of the whole run.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, pairs: Sequence[LayerPair]
    ) -> None:
        self._parallel = parallel
        self._sum = torch.zeros((), dtype=torch.float64, device=next(chunks[0].parameters()).device)
        # Every schedule runs a chunk over the micro-batches in order, so a queue identifies the current one.
        self._waiting: dict[LayerPair, deque[tuple[Tensor, Tensor]]] = {}
        for model in map(unwrap, chunks):
            for layer in model.decoder.layers:
                for pair in pairs:
                    if pair.student_layer == layer.layer_number:
                        self._waiting[pair] = deque()
                        weight = projections.weight_of(model, pair)
                        layer.register_forward_hook(partial(self._match, pair, weight))

    def start_batch(self, batches: Sequence[MicroBatch], teacher_states: TeacherStates) -> None:
        """Queues the teacher's states of a global batch.

        Args:
            batches: the student's micro-batches.
            teacher_states: hold the outputs of the teacher's layers that are matched on this stage.
        """
        if not self._waiting:
            return
        mine = [batch.context_shard(self._parallel.cp_rank, self._parallel.layout.context) for batch in batches]
        masks = [self._part(batch.loss_mask.t()).reshape(-1) for batch in mine]
        of_layers = {
            layer: [teacher_states.pop(layer, batch.sample_ids) for batch in batches]
            for layer in {pair.teacher_layer for pair in self._waiting}
        }
        for pair, waiting in self._waiting.items():
            assert not waiting, f"{len(waiting)} micro-batches of the last step were not matched"
            waiting.extend(zip(of_layers[pair.teacher_layer], masks, strict=True))

    def loss(self) -> Loss:
        """The matching loss added since the last call, summed over this rank's part of the valid tokens.

        Collective over the tensor-parallel ranks under sequence parallelism. `num_tokens` is 0, because the last stage
        counts the tokens.
        """
        total, self._sum = self._sum, torch.zeros_like(self._sum)
        if self._parallel.layout.sequence:
            dist.all_reduce(total, group=self._parallel.groups.tp)
        return Loss(total, torch.zeros_like(total), {"matching": total})

    def _part(self, rows: Tensor) -> Tensor:
        """`[s, ...]` to this rank's shard `[s/tp, ...]` under sequence parallelism."""
        layout = self._parallel.layout
        return rows.chunk(layout.tensor)[self._parallel.tp_rank] if layout.sequence else rows

    def _match(
        self, pair: LayerPair, projection: Tensor | None, layer: torch.nn.Module, _: Any, output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any] | None:
        """The forward hook: returns `(hidden states [s, b, h], context)` with the loss attached; None in eval mode, and
        in the first of the two forward passes of a recomputed layer, which has no gradient."""
        if not layer.training or not torch.is_grad_enabled():
            return None
        hidden, context = output
        teacher_hidden, mask = self._waiting[pair].popleft()
        flat, loss = match(hidden.flatten(0, 1), teacher_hidden.flatten(0, 1), mask, pair.kind, pair.weight, projection)
        self._sum += loss
        # Megatron frees the output that a stage has sent, and cannot free a view.
        matched = make_viewless_tensor(flat.view_as(hidden), requires_grad=True, keep_graph=True)
        return matched, context
