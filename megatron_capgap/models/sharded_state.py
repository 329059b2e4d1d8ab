"""A model's parameters by their layout-free names: Megatron's sharded state, and initial weights drawn through it."""

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

# Rows drawn at once while initialising: bounds the memory, does not change the values.
_ROWS = 4096


def sharded_state(
    chunks: list[torch.nn.Module], parallel: ParallelContext, *, with_projections: bool = True
) -> ShardedStateDict:
    """Megatron's sharded state dict of all chunks of this rank, parameters alone.

    The keys name every tensor the same way in every layout. Scales of FP8 have keys of their own: see `models.scales`.

    Args:
        chunks: this rank's model chunks.
        parallel: their layout.
        with_projections: False leaves the model alone.

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
    """Every local shard, with its place in the whole tensor; `.data` is a view of the parameter, to be written to."""
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
    """Fills all weights with random values that depend on the seed and the parameter's name alone.

    Every tensor has a generator of its own and is drawn whole, row by row, whichever part a rank keeps: the same
    model in every layout, on every device.

    Args:
        chunks: this rank's model chunks.
        shape: gives the standard deviations.
        parallel: this rank's place.
        seed: of the run.
        only_projections: leaves the model as it is.
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
    """Draws the whole tensor `[rows, columns]` of one layer in blocks of rows and keeps this rank's part.

    Rows beyond the vocabulary are padding that depends on the layout: they are not drawn and become zero.
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
