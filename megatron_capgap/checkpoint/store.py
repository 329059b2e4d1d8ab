"""Weights, optimizer and random state out of Megatron's distributed checkpoints, in any layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megatron_capgap.checkpoint import contents, scales
from megatron_capgap.checkpoint import manifest as manifests
from megatron_capgap.checkpoint.manifest import Manifest
from megatron_capgap.config.errors import UserError, in_one_line
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import size
from megatron_capgap.models.fp8_weights import in_compute_type, written_in_compute_type
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.models.projections import PREFIX
from megatron_capgap.models.state import sharded_state
from megatron_capgap.runtime.launch import on_ranks_alike
from megatron_capgap.runtime.layout import Grid


class Optimization(Protocol):
    """What a checkpoint needs of the training room's optimizer and schedule."""

    def sharded_state(self, model: ShardedStateDict, *, loading: bool) -> ShardedStateDict:
        """Its state by layout-free names. Collective; over groups of its own unless it is loaded."""

    def copied(self) -> Optimization:
        """What `sharded_state` reads, in host memory, as it is now."""

    def load(self, state: dict[str, Any], steps: int, updates: int) -> None:
        """Takes over a loaded state that stands for `steps` steps, of which `updates` changed the weights."""


def load_weights(folder: Path, chunks: Sequence[torch.nn.Module], grid: Grid) -> None:
    """Fills a model from a checkpoint written in any layout; every parameter must be in it. Collective.

    Projections are no part of the model: they stay as they are, and those of the checkpoint are not looked at.

    Raises:
        UserError: the checkpoint is damaged, or of another model; on every rank alike.
    """
    contents.verify(folder)
    state = sharded_state(list(chunks), grid, with_projections=False)
    _fill(chunks, _load(in_compute_type(state), folder))


def load_head(
    folder: Path, shape: ModelShape, grid: Grid, dtype: torch.dtype, device: torch.device, *, verified: bool
) -> torch.Tensor | None:
    """A model's LM head alone, cut over the tensor-parallel ranks of any layout. Collective.

    Args:
        folder: the checkpoint.
        shape: of the model in it.
        grid: the layout that the head is wanted in.
        dtype, device: of the result.
        verified: whether these ranks have checked the checkpoint already, as loading its weights does.

    Returns:
        The local shard `[v/tp, h]`, rows beyond the vocabulary 0, on the layout's last stage; None on the others.

    Raises:
        UserError: the checkpoint is damaged; on every rank alike.
    """
    if not verified:
        contents.verify(folder)
    state: ShardedStateDict = {}
    if grid.on_last_stage:
        rows = size.padded_vocab(shape.vocab, grid.layout.tensor) // grid.layout.tensor
        state["head"] = make_tp_sharded_tensor_for_checkpoint(
            torch.zeros(rows, shape.hidden, dtype=dtype, device=device),
            "embedding.word_embeddings.weight" if shape.tied_embeddings else "output_layer.weight",
            allow_shape_mismatch=True,
            tp_group=grid.groups.tp,
            dp_cp_group=grid.groups.dp_cp,
        )
    return _load(state, folder).get("head")


def load_training(folder: Path, chunks: Sequence[torch.nn.Module], grid: Grid, optimization: Optimization) -> Manifest:
    """Fills model, optimizer, schedule, FP8 scales and random state from a checkpoint. Collective.

    In the layout that wrote it the run goes on to the last digit; in another one weights and optimizer are the same and
    dropout draws from new random streams.

    Returns:
        What the checkpoint says of itself.

    Raises:
        Damaged: a file of the checkpoint is not what was written; nothing of it was used. On every rank alike.
    """
    contents.verify(folder)
    manifest = manifests.read(folder)
    same_ranks = manifest.ranks == ranks(grid) and manifest.device == chunks_device(chunks)
    # Without its own scales, delayed scaling starts as a new run would; other recipes keep none.
    config = unwrap(chunks[0]).config
    delayed = manifest.holds_scales and config.fp8 is not None and config.fp8_recipe == manifest.fp8_recipe
    model = sharded_state(list(chunks), grid)
    state = {**in_compute_type(model), "optimizer": optimization.sharded_state(model, loading=True)}
    if delayed:
        state |= on_ranks_alike(lambda: scales.wanted(folder, chunks, grid))
    if same_ranks:
        state["random"] = _random_state()
    loaded = _load(state, folder)
    on_ranks_alike(lambda: scales.take_over(folder, chunks, loaded.get(scales.KEY, {})))
    _fill(chunks, loaded)
    optimization.load(loaded["optimizer"], manifest.step, manifest.step - manifest.skipped)
    if same_ranks:
        _set_random_state(loaded["random"])
    return manifest


def chunks_device(chunks: Sequence[torch.nn.Module]) -> str:
    """Kind of device that a model lives on: cpu or cuda."""
    return next(chunks[0].parameters()).device.type


def ranks(grid: Grid) -> tuple[int, int, int, int]:
    """(tensor, pipeline, virtual pipeline, data) sizes."""
    layout = grid.layout
    return layout.tensor, layout.pipeline, layout.virtual_pipeline, grid.data_size


def training_state(
    chunks: Sequence[torch.nn.Module], grid: Grid, optimization: Optimization, *, copied: bool
) -> Callable[[], ShardedStateDict]:
    """All that a run needs to go on, by layout-free names, as it is now.

    Args:
        chunks: this rank's model chunks.
        grid: their layout.
        optimization: optimizer and schedule.
        copied: whether this rank's part is to be a copy in host memory, which later training does not change.

    Returns:
        Gathers the optimizer's state on the data-parallel ranks that write it. Collective, over groups that training
        does not use: it may run beside it.
    """
    model = sharded_state(list(chunks), grid)
    written = {**written_in_compute_type(model), **scales.written(chunks, grid), "random": _random_state()}
    if copied:
        written, optimization = dict_list_map_outplace(_in_host_memory, written), optimization.copied()
    # The optimizer finds its names by the parameters themselves.
    return lambda: {**written, "optimizer": optimization.sharded_state(model, loading=False)}


def _in_host_memory(shard: ShardedBase) -> ShardedBase:
    """The shard with a copy of its data, where this rank writes it."""
    if not is_main_replica(shard.replica_id):
        return shard
    if isinstance(shard, ShardedTensor | ShardedTensorFactory):
        return replace(shard, data=shard.data.detach().to("cpu", copy=True))
    return replace(shard, data=copy.deepcopy(shard.data))


def _load(state: ShardedStateDict, folder: Path) -> dict[str, Any]:
    """Reads what a sharded state asks for. Collective: an error of one rank is raised on all.

    Until 0.17 Megatron-Core reads together; from 0.18 on each rank reads by itself and keeps its errors to itself.
    """
    return on_ranks_alike(lambda: _read(state, folder))


def _read(state: ShardedStateDict, folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except dist_checkpointing.core.CheckpointingException as error:
        raise _unfit(folder, error) from error
    except CheckpointException as error:  # torch's, with the reason of each rank
        raise _unfit(folder, next(iter(error.failures.values()))[0]) from error


def _unfit(folder: Path, error: BaseException) -> UserError:
    reason = in_one_line(error)
    return UserError(f"{folder}: does not hold what the model needs ({reason}); use a checkpoint of the model's shape")


def _fill(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        part = loaded["model"] if len(chunks) == 1 else loaded[f"model{index}"]
        missing, unexpected = unwrap(chunk).load_state_dict(part, strict=False)
        left_over = [name for name in missing if not name.endswith("_extra_state") and not name.startswith(PREFIX)]
        assert not left_over and not unexpected, (left_over, unexpected)


def _random_state() -> ShardedTensor:
    """All generators of this rank as one row of bytes: torch's, then Megatron's tracker by name."""
    states = get_cuda_rng_tracker().get_states()
    row = torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(), *(states[name] for name in sorted(states))])
    rank, world = dist.get_rank(), dist.get_world_size()
    return ShardedTensor.from_rank_offsets("random", row.unsqueeze(0), (0, rank, world))


def _set_random_state(row: torch.Tensor) -> None:
    states = get_cuda_rng_tracker().get_states()
    current = [torch.get_rng_state(), torch.cuda.get_rng_state(), *(states[name] for name in sorted(states))]
    main, device, *tracked = torch.split(row.reshape(-1).cpu(), [state.numel() for state in current])
    torch.set_rng_state(main.clone())
    torch.cuda.set_rng_state(device.clone())
    get_cuda_rng_tracker().set_states(
        {name: state.clone() for name, state in zip(sorted(states), tracked, strict=True)}
    )
