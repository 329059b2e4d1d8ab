"""What delayed FP8 scaling has learned, in checkpoints: plain tensors that any layout and any Transformer Engine reads.

Older checkpoints hold Transformer Engine's pickles in their place. They are read by `safe`, never by Transformer
Engine, whose newer releases refuse them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.utils import get_pg_rank, make_sharded_tensor_for_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_capgap.checkpoint import safe_unpickle
from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models import fp8_scales
from megatron_capgap.models.gpt import unwrap

KEY = "scales"
"""Of all of them, in the state that is saved or loaded."""


def to_save(chunks: Sequence[torch.nn.Module], parallel: ParallelContext) -> ShardedStateDict:
    """Scales and histories of this rank's layers, as they are now; none before the first step."""
    layers = unwrap(chunks[0]).config.num_layers
    found = {}
    for layer, name, module in fp8_scales.linears(chunks):
        if state := fp8_scales.state_of(module):
            found[f"{layer}.{name}"] = _shards(layer, layers, name, state, parallel)
    return {KEY: found} if found else {}


def load_request(folder: Path, chunks: Sequence[torch.nn.Module], parallel: ParallelContext) -> ShardedStateDict:
    """What a checkpoint holds for this rank's layers, to be loaded and given to `take_over`.

    Raises:
        UserError: the checkpoint holds something else under these names.
    """
    layers = unwrap(chunks[0]).config.num_layers
    there = safe_unpickle.read_metadata(folder).metadata.state_dict_metadata
    found: dict[str, Any] = {}

    def size(key: str) -> tuple[int, ...]:
        entry = there[key]
        assert isinstance(entry, TensorStorageMetadata), f"{folder}: {key} is no tensor"
        return tuple(entry.size[1:])

    for layer, name, _ in fp8_scales.linears(chunks):
        sizes = {part: size(key) for part in fp8_scales.COUNTS if (key := f"{fp8_scales.PREFIX}{name}.{part}") in there}
        replica = (0, get_pg_rank(parallel.groups.tp), get_pg_rank(parallel.groups.dp_cp))
        pickled = ShardedObject(f"{name}{safe_unpickle.SCALES}", None, (layers,), (layer,), replica)
        if sizes:
            _check(folder, name, sizes)
            state = {part: torch.empty(shape) for part, shape in sizes.items()}
            found[f"{layer}.{name}"] = _shards(layer, layers, name, state, parallel)
        elif pickled.unique_key in there:
            found[f"{layer}.{name}"] = pickled
    return {KEY: found} if found else {}


def restore(folder: Path, chunks: Sequence[torch.nn.Module], loaded: Mapping[str, Any]) -> None:
    """Gives this rank's layers what was loaded of `wanted`, before weights that live in FP8 are cast with it.

    Raises:
        UserError: a pickle holds something else than scales.
    """
    if not loaded:
        return
    # Megatron-Core has no such function where Transformer Engine is missing, and then nothing was wanted.
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(unwrap(chunks[0]).config)
    for layer, name, module in fp8_scales.linears(chunks):
        held = loaded.get(f"{layer}.{name}")
        state = held if isinstance(held, dict) else safe_unpickle.load_scales(held)
        if state:
            _check(folder, name, {part: tuple(tensor.shape) for part, tensor in state.items()})
            fp8_scales.set_state(module, state, recipe)


def _shards(
    layer: int, layers: int, name: str, state: Mapping[str, torch.Tensor], parallel: ParallelContext
) -> ShardedStateDict:
    """Of one linear, each `[layers, ...]` as a whole: cut over the layers as weights are, the same on all tensor- and
    data-parallel ranks."""
    return {
        part: make_sharded_tensor_for_checkpoint(
            tensor,
            f"{fp8_scales.PREFIX}{name}.{part}",
            ((0, layer, layers),),
            tp_group=parallel.groups.tp,
            dp_cp_group=parallel.groups.dp_cp,
        )
        for part, tensor in state.items()
    }


def _check(folder: Path, name: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses what is not one linear's scales `[n]` and histories `[steps, n]`."""
    for part, count in fp8_scales.COUNTS.items():
        size = sizes.get(part)
        steps = () if part.startswith("scale") or not size else size[:1]
        if size != (*steps, count) or 0 in size:
            found = "missing" if size is None else list(size)
            raise UserError(f"{folder}: {part} of {name} is {found}; use a checkpoint that this project wrote")
