"""Saves and loads the state of delayed FP8 scaling as plain tensors, for any layout and Transformer Engine release.

Older checkpoints have Transformer Engine pickles instead. These are read by `safe_unpickle`, not by Transformer Engine,
whose newer releases reject them.
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
"""Key of all scales in the state that is saved or loaded."""


def to_save(chunks: Sequence[torch.nn.Module], parallel: ParallelContext) -> ShardedStateDict:
    """Current scales and histories of this rank's layers; empty before the first step."""
    layers = unwrap(chunks[0]).config.num_layers
    found = {}
    for layer, name, module in fp8_scales.linears(chunks):
        if state := fp8_scales.state_of(module):
            found[f"{layer}.{name}"] = _shards(layer, layers, name, state, parallel)
    return {KEY: found} if found else {}


def load_request(folder: Path, chunks: Sequence[torch.nn.Module], parallel: ParallelContext) -> ShardedStateDict:
    """The scales that a checkpoint has for this rank's layers, as a state to load and pass to `restore`.

    Raises:
        UserError: entries of these names have unexpected shapes.
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
    """Sets the loaded state of `load_request` in this rank's layers; call this before casting weights to FP8.

    Raises:
        UserError: the loaded scales have unexpected shapes.
    """
    if not loaded:
        return
    # Megatron-Core lacks this function without Transformer Engine; then nothing was requested.
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
    """Shards of one linear's state: global tensors `[layers, ...]`, sharded over layers like the weights, replicated
    over tensor- and data-parallel ranks."""
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
    """Checks that the shapes are one linear's scales `[n]` and histories `[steps, n]`."""
    for part, count in fp8_scales.COUNTS.items():
        size = sizes.get(part)
        steps = () if part.startswith("scale") or not size else size[:1]
        if size != (*steps, count) or 0 in size:
            found = "missing" if size is None else list(size)
            raise UserError(f"{folder}: {part} of {name} is {found}; use a checkpoint that this project wrote")
