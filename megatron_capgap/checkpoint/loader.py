"""Loads weights, optimizer and random state from Megatron's distributed checkpoints, in any layout."""

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

from megatron_capgap.checkpoint import fp8_scales, integrity, metadata
from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.distributed.collectives import run_on_all_ranks
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models import size
from megatron_capgap.models.fp8_weights import in_compute_type, written_in_compute_type
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.models.projections import PREFIX
from megatron_capgap.models.sharded_state import sharded_state


class CheckpointableOptimizer(Protocol):
    """Interface of the training optimizer and schedule to checkpoints."""

    def sharded_state(self, model: ShardedStateDict, *, loading: bool) -> ShardedStateDict:
        """Sharded state by layout-independent names. Collective; when saving, over process groups of its own."""

    def copied(self) -> CheckpointableOptimizer:
        """A copy in host memory of the current state that `sharded_state` reads."""

    def load(self, state: dict[str, Any], steps: int, updates: int) -> None:
        """Sets a loaded state after `steps` steps, of which `updates` changed the weights."""


def load_weights(folder: Path, chunks: Sequence[torch.nn.Module], parallel: ParallelContext) -> None:
    """Loads a model from a checkpoint written in any layout, which must have every parameter. Collective.

    Projections are not part of the model: they are neither changed nor read from the checkpoint.

    Raises:
        UserError: the checkpoint is damaged, or of another model; raised on all ranks.
    """
    integrity.verify(folder)
    state = sharded_state(list(chunks), parallel, with_projections=False)
    _copy_into_chunks(chunks, _load(in_compute_type(state), folder))


def load_head(
    folder: Path,
    shape: ModelShape,
    parallel: ParallelContext,
    dtype: torch.dtype,
    device: torch.device,
    *,
    verified: bool,
) -> torch.Tensor | None:
    """Loads only the LM head of a model, sharded over the tensor-parallel ranks of any layout. Collective.

    Args:
        folder: the checkpoint.
        shape: shape of the model in the checkpoint.
        parallel: the target layout.
        dtype, device: type and device of the result.
        verified: whether these ranks have already verified the checkpoint, as loading its weights does.

    Returns:
        The local shard `[v/tp, h]`, with zero rows beyond the vocabulary, on the last stage; None on other stages.

    Raises:
        UserError: the checkpoint is damaged; raised on all ranks.
    """
    if not verified:
        integrity.verify(folder)
    state: ShardedStateDict = {}
    if parallel.is_last_stage:
        rows = size.padded_vocab(shape.vocab, parallel.layout.tensor) // parallel.layout.tensor
        state["head"] = make_tp_sharded_tensor_for_checkpoint(
            torch.zeros(rows, shape.hidden, dtype=dtype, device=device),
            "embedding.word_embeddings.weight" if shape.tied_embeddings else "output_layer.weight",
            allow_shape_mismatch=True,
            tp_group=parallel.groups.tp,
            dp_cp_group=parallel.groups.dp_cp,
        )
    return _load(state, folder).get("head")


def load_training(
    folder: Path, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, optimizer: CheckpointableOptimizer
) -> CheckpointMetadata:
    """Loads model, optimizer, schedule, FP8 scales and random state from a checkpoint. Collective.

    In the layout that wrote the checkpoint, the run continues bit-identically; in another layout, weights and optimizer
    are the same and dropout uses new random streams.

    Returns:
        The checkpoint's metadata.

    Raises:
        CheckpointCorrupted: a file differs from what was written; nothing was loaded. Raised on all ranks.
    """
    integrity.verify(folder)
    meta = metadata.read(folder)
    same_layout = meta.parallel_sizes == parallel_sizes(parallel) and meta.device == chunks_device(chunks)
    # Without saved scales, delayed scaling starts as in a new run; other recipes have no state.
    config = unwrap(chunks[0]).config
    delayed = meta.holds_scales and config.fp8 is not None and config.fp8_recipe == meta.fp8_recipe
    model = sharded_state(list(chunks), parallel)
    state = {**in_compute_type(model), "optimizer": optimizer.sharded_state(model, loading=True)}
    if delayed:
        state |= run_on_all_ranks(lambda: fp8_scales.load_request(folder, chunks, parallel))
    if same_layout:
        state["random"] = _random_state()
    loaded = _load(state, folder)
    run_on_all_ranks(lambda: fp8_scales.restore(folder, chunks, loaded.get(fp8_scales.KEY, {})))
    _copy_into_chunks(chunks, loaded)
    optimizer.load(loaded["optimizer"], meta.step, meta.step - meta.skipped)
    if same_layout:
        _set_random_state(loaded["random"])
    return meta


def chunks_device(chunks: Sequence[torch.nn.Module]) -> str:
    """Device type of a model: cpu or cuda."""
    return next(chunks[0].parameters()).device.type


def parallel_sizes(parallel: ParallelContext) -> tuple[int, int, int, int]:
    """(tensor, pipeline, virtual pipeline, data times context) sizes."""
    layout = parallel.layout
    return layout.tensor, layout.pipeline, layout.virtual_pipeline, parallel.dp_size * layout.context


def training_state(
    chunks: Sequence[torch.nn.Module], parallel: ParallelContext, optimizer: CheckpointableOptimizer, *, copied: bool
) -> Callable[[], ShardedStateDict]:
    """Captures the current state that a run needs to resume, by layout-independent names.

    Args:
        chunks: this rank's model chunks.
        parallel: their layout.
        optimizer: optimizer and schedule.
        copied: whether to copy this rank's part to host memory, so that training can continue.

    Returns:
        A function that gathers the optimizer state on the data-parallel ranks that write it. Collective, over process
        groups that training does not use: it may run concurrently with training.
    """
    model = sharded_state(list(chunks), parallel)
    written = {**written_in_compute_type(model), **fp8_scales.to_save(chunks, parallel), "random": _random_state()}
    if copied:
        written, optimizer = dict_list_map_outplace(_in_host_memory, written), optimizer.copied()
    # The optimizer derives its names from the parameters, so it gets the uncopied model state.
    return lambda: {**written, "optimizer": optimizer.sharded_state(model, loading=False)}


def _in_host_memory(shard: ShardedBase) -> ShardedBase:
    """The shard with a host copy of its data, if this rank writes it."""
    if not is_main_replica(shard.replica_id):
        return shard
    if isinstance(shard, ShardedTensor | ShardedTensorFactory):
        return replace(shard, data=shard.data.detach().to("cpu", copy=True))
    return replace(shard, data=copy.deepcopy(shard.data))


def _load(state: ShardedStateDict, folder: Path) -> dict[str, Any]:
    """Loads the entries of a sharded state. Collective: an error of one rank is raised on all.

    Up to Megatron-Core 0.17 the load is collective; from 0.18 on each rank loads by itself and errors stay local.
    """
    return run_on_all_ranks(lambda: _read(state, folder))


def _read(state: ShardedStateDict, folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except dist_checkpointing.core.CheckpointingException as error:
        raise _load_error(folder, error) from error
    except CheckpointException as error:  # raised by torch, with the error of each rank
        raise _load_error(folder, next(iter(error.failures.values()))[0]) from error


def _load_error(folder: Path, error: BaseException) -> UserError:
    reason = in_one_line(error)
    return UserError(f"{folder}: does not have what the model needs ({reason}); use a checkpoint of the model's shape")


def _copy_into_chunks(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        part = loaded["model"] if len(chunks) == 1 else loaded[f"model{index}"]
        missing, unexpected = unwrap(chunk).load_state_dict(part, strict=False)
        left_over = [name for name in missing if not name.endswith("_extra_state") and not name.startswith(PREFIX)]
        assert not left_over and not unexpected, (left_over, unexpected)


def _random_state() -> ShardedTensor:
    """States of all random generators of this rank as one row of bytes: torch CPU and device, then Megatron's tracker
    sorted by name."""
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
