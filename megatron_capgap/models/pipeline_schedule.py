"""Runs Megatron's pipeline schedules over this rank's model chunks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_capgap.distributed.parallel_context import ParallelContext


class LastStage(Protocol):
    """What the last stage makes of a micro-batch: see `run`."""

    def __call__(self, hidden: Tensor, /, batch: Any) -> Any: ...


def run(
    chunks: Sequence[torch.nn.Module],
    parallel: ParallelContext,
    micro_batches: Sequence[Any],
    last_stage: LastStage,
    *,
    forward_only: bool,
    shape: tuple[int, int],
) -> list[Any]:
    """Runs the schedule of the chunks' config (none, 1F1B or interleaved) over the micro-batches. Collective.

    Args:
        chunks: this rank's model chunks, wrapped or bare.
        parallel: their layout.
        micro_batches: each has `tokens` and `position_ids` `[b, s]`, and an `attention_mask` `[b, 1, s, s]` or None;
            whole rows. With context parallelism also `context_shard(rank, size)`: what the forward pass and
            `last_stage` get.
        last_stage: called on the last stage with the final hidden states `[s, b, h]` (`[s/tp, b, h]` under sequence
            parallelism; s/cp in place of s under context parallelism) and their micro-batch. Returns (loss_sum,
            num_tokens, result); with forward_only any scalar tensor in place of loss_sum. Megatron divides gradients by
            the global sum of num_tokens.
        forward_only: skips the backward pass.
        shape: (length of the whole sequence, micro-batch size).

    Returns:
        `last_stage`'s third value (result) for each micro-batch; empty on other stages.
    """
    config = get_model_config(chunks[0])
    if parallel.layout.context > 1:
        micro_batches = [batch.context_shard(parallel.cp_rank, parallel.layout.context) for batch in micro_batches]

    def forward(iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        hidden = model(batch.tokens, batch.position_ids, attention_mask=batch.attention_mask)
        return hidden, partial(last_stage, batch=batch)

    execute = get_forward_backward_func(
        pp_size=parallel.layout.pipeline, vp_size=config.virtual_pipeline_model_parallel_size
    )
    return execute(
        forward_step_func=forward,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=shape[0],
        micro_batch_size=shape[1],
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(parallel.groups.pp, config),
        pg_collection=parallel.groups,
    )
