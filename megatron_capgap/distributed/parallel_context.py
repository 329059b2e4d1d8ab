"""A model's layout as process groups: who holds which shard. The only reader of Megatron's `parallel_state`.

Megatron keeps the groups of one layout in module globals. Several layouts live side by side in one world because each
`Grid` remembers its globals: `build` leaves the first one in force, `beside` makes further ones, and `Grid.active` puts
one in force for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_capgap.config.schema import Layout


@dataclass(frozen=True)
class ParallelContext:
    """One layout over the whole world, seen from this rank."""

    layout: Layout
    groups: ProcessGroupCollection
    """Every process group that Megatron-Core's modules, schedules and optimizer ask for."""
    tp_rank: int
    pp_rank: int
    dp_rank: int
    dp_size: int
    state: Mapping[str, Any] = field(repr=False)
    """What Megatron's module globals hold while this layout is in force."""

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Puts this layout in force, and the one before again afterwards."""
        before = _state()
        vars(parallel_state).update(self.state)
        try:
            yield
        finally:
            vars(parallel_state).update(before)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the input embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the LM head, and computes the loss."""
        return self.pp_rank == self.layout.pipeline - 1

    def all_reduce_over_dp_and_pp(self, values: torch.Tensor) -> torch.Tensor:
        """Adds sums over tokens over the data-parallel ranks and the pipeline stages. Collective.

        Args:
            values: a vector of sums over this rank's tokens, 0 for what another stage counts; replicated over
                tensor-parallel ranks.

        Returns:
            Their sums, replicated on all ranks.
        """
        total = values.clone()
        dist.all_reduce(total, group=self.groups.dp_cp)
        if self.layout.pipeline > 1:
            dist.all_reduce(total, group=self.groups.pp)
        return total


def build(layout: Layout, seed: int, timeout_seconds: int = 600) -> ParallelContext:
    """Makes the process groups of `layout` over the whole world and puts them in force; forgets all others. Collective.

    Virtual stages are not told to `parallel_state`: schedules and modules read them from the model's own config.

    Args:
        layout: sizes; their product with the data-parallel size is the world size.
        seed: decides dropout; every pipeline stage and data-parallel rank draws its own.
        timeout_seconds: how long a collective may wait.
    """
    destroy()
    parallel = _initialise(layout, timeout_seconds)
    torch.manual_seed(seed + parallel.dp_rank)
    model_parallel_cuda_manual_seed(seed + 100 * parallel.pp_rank + 10_000 * parallel.dp_rank, force_reset_rng=True)
    return parallel


def build_additional(first: ParallelContext, layout: Layout, timeout_seconds: int = 600) -> ParallelContext:
    """A further layout of the same world, for a model that draws no random numbers; `first` stays in force. Collective.

    Args:
        first: from `build`; where `layout` cuts the world alike, its process groups serve both.
        layout: sizes; their product with the data-parallel size is the world size.
        timeout_seconds: how long a collective may wait.
    """
    if all(getattr(layout, name) == getattr(first.layout, name) for name in ("tensor", "pipeline", "context")):
        return replace(first, layout=layout)
    before, buffers = _state(), parallel_state._GLOBAL_MEMORY_BUFFER
    # Megatron forgets other groups but destroys those over gloo, which `first` still saves its optimizer through.
    vars(parallel_state).update({name: None for name in before if name.endswith("_GLOO")})
    destroy()
    try:
        return _initialise(layout, timeout_seconds)
    finally:
        vars(parallel_state).update(before)
        parallel_state._GLOBAL_MEMORY_BUFFER = buffers


def destroy() -> None:
    """Forgets every process group of the layout in force."""
    parallel_state.destroy_model_parallel()


def _initialise(layout: Layout, timeout_seconds: int) -> ParallelContext:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    return ParallelContext(
        layout=layout,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        state=_state(),
    )


def _state() -> dict[str, Any]:
    """Megatron's globals, but for the buffers of all-gathers, which any layout may use while it is in force."""
    found = {name: value for name, value in vars(parallel_state).items() if name[0] == "_" and name[1:2].isupper()}
    return {name: value for name, value in found.items() if "MEMORY_BUFFER" not in name}
