"""Megatron's sharded state of a model's parameters, and initialisation; both independent of the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors

from megatron_capgap.config.schema import ModelShape
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models.gpt import init_std, unwrap
from megatron_capgap.models.projections import PREFIX

# Rows drawn at a time during initialisation: bounds memory without changing the values.
_ROWS = 4096


def sharded_state(
    chunks: list[torch.nn.Module], parallel: ParallelContext, *, with_projections: bool = True
) -> ShardedStateDict:
    """Megatron's sharded state dict of all chunks of this rank, parameters only.

    The keys are the same in every layout. FP8 scales have their own keys: see `models.fp8_scales`.

    Args:
        chunks: this rank's model chunks.
        parallel: their layout.
        with_projections: False leaves the projections out.

    Returns:
        `{"model": {...}}`, or `{"model0": {...}, "model1": {...}}` with virtual stages.
    """
    metadata = {"dp_cp_group": parallel.groups.dp_cp}
    state = {}
    for index, chunk in enumerate(chunks):
        part = unwrap(chunk).sharded_state_dict(metadata=metadata)
        name = "model" if len(chunks) == 1 else f"model{index}"
        state[name] = {
            key: value
            for key, value in part.items()
            if not key.endswith("_extra_state") and (with_projections or not key.startswith(PREFIX))
        }
    return state


def shards(chunks: list[torch.nn.Module], parallel: ParallelContext) -> Iterator[ShardedTensor]:
    """Every local shard, with its offset in the whole tensor; `.data` is a writable view of the parameter."""
    state = sharded_state(chunks, parallel)
    apply_factories(state)
    tensors, _ = extract_sharded_tensors(state)
    yield from nested_values(tensors)


@torch.no_grad()
def initialise(
    chunks: list[torch.nn.Module],
    shape: ModelShape,
    parallel: ParallelContext,
    seed: int,
    *,
    only_projections: bool = False,
) -> None:
    """Fills all weights with random values that depend only on the seed and the parameter's name.

    Each tensor has its own generator and is drawn completely, row by row, whichever shard a rank keeps. The model is
    therefore the same in every layout and on every device.

    Args:
        chunks: this rank's model chunks.
        shape: gives the standard deviations.
        parallel: the layout and this rank's place in it.
        seed: of the run.
        only_projections: initialises the projections only.
    """
    for shard in shards(chunks, parallel):
        if only_projections and not shard.key.startswith(PREFIX):
            continue
        std = init_std(shard.key, shape)
        if std is None:
            shard.data.fill_(1.0)
        elif std == 0.0:
            shard.data.zero_()
        else:
            _draw(shard, std, seed, shape.vocab)


def _draw(shard: ShardedTensor, std: float, seed: int, vocab: int) -> None:
    """Draws the whole tensor `[rows, columns]` of one layer in blocks of rows and keeps this rank's shard.

    Rows beyond the vocabulary are padding, whose number depends on the layout: they are not drawn and are set to 0.
    """
    prefix = shard.prepend_axis_num
    rows, columns = shard.global_shape[prefix:]
    row0, column0 = shard.global_offset[prefix:]
    local_rows, local_columns = shard.data.shape
    if shard.key.startswith(("embedding.word_embeddings.", "output_layer.")):
        rows = vocab
    name = f"{seed}/{shard.key}/{shard.global_offset[:prefix]}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
    shard.data.zero_()
    for start in range(0, min(rows, row0 + local_rows), _ROWS):
        block = torch.empty(min(_ROWS, rows - start), columns).normal_(0.0, std, generator=generator)
        first, last = max(row0, start), min(row0 + local_rows, start + block.shape[0])
        if first < last:
            part = block[first - start : last - start, column0 : column0 + local_columns]
            shard.data[first - row0 : last - row0].copy_(part)
