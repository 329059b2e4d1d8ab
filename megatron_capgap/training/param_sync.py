"""Waits for weights that are gathered over data-parallel ranks while the forward pass runs.

With `train.overlap` Megatron waits for a weight when the module that holds it runs forward. Code that reads a weight
elsewhere (the loss, matched layers, a checkpoint) must call one of these functions, or it reads the weight of the step
before. Without overlap they do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_capgap.models.gpt import unwrap


def lm_head(chunk: torch.nn.Module) -> Tensor:
    """The LM head's local shard `[v/tp, h]` of a last stage, wrapped or bare, as the last update left it."""
    weight = unwrap(chunk).lm_head()
    wait_for(chunk, [weight])
    return weight


def wait_for(chunk: torch.nn.Module, weights: Iterable[Tensor]) -> None:
    """Waits until the weights are gathered. Collective over the data-parallel ranks if their gathering has not begun.

    Args:
        chunk: a model chunk, wrapped or bare.
        weights: some of its parameters.
    """
    if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
        for weight in weights:
            if weight in chunk.param_to_bucket_group:
                # The forward pass itself dispatches one bucket after the other.
                chunk.param_to_bucket_group[weight].finish_param_sync(skip_next_bucket_dispatch=True)


def gather_all(chunks: Sequence[torch.nn.Module]) -> None:
    """Gathers all weights of all chunks and waits for them. Collective over the data-parallel ranks."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            # Not start_param_sync(force_sync=True): until 0.19 it does not renew the transposed copies of FP8 weights.
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.finish_param_sync(skip_next_bucket_dispatch=True)
