"""Parallel context: the process groups of a model's layout. The only module that reads Megatron's `parallel_state`.

Megatron keeps the groups of one layout in module globals. Several layouts coexist in one world because each
`ParallelContext` stores these globals: `build` activates the first layout, `build_additional` creates more, and
`ParallelContext.activate` activates one temporarily.
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
    """One layout over the whole world, as seen from this rank."""

    layout: Layout
    groups: ProcessGroupCollection
    """Process groups for Megatron-Core's modules, schedules and optimizer."""
    tp_rank: int
    pp_rank: int
    dp_rank: int
    dp_size: int
    state: Mapping[str, Any] = field(repr=False)
    """Values of Megatron's module globals while this layout is active."""

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Activates this layout; restores the previous one at exit."""
        before = _state()
        vars(parallel_state).update(self.state)
        try:
            yield
        finally:
            vars(parallel_state).update(before)

    @property
    def cp_rank(self) -> int:
        """Which part of the sequence this rank has."""
        return self.groups.cp.rank() if self.layout.context > 1 else 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the input embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the LM head, and computes the loss."""
        return self.pp_rank == self.layout.pipeline - 1

    def all_reduce_over_dp_and_pp(self, values: torch.Tensor) -> torch.Tensor:
        """Sums token statistics over data- and context-parallel ranks and pipeline stages. Collective: 1 or 2
        all-reduces.

        Args:
            values: sums over this rank's tokens, 0 for values of another stage; replicated over tensor-parallel ranks.

        Returns:
            The sums, replicated on all ranks.
        """
        total = values.clone()
        dist.all_reduce(total, group=self.groups.dp_cp)
        if self.layout.pipeline > 1:
            dist.all_reduce(total, group=self.groups.pp)
        return total


def build(layout: Layout, seed: int, timeout_seconds: int = 600) -> ParallelContext:
    """Creates the process groups of `layout` over the whole world and activates them; drops all others. Collective.

    Virtual stages are not passed to `parallel_state`: schedules and modules read them from the model's config.

    Args:
        layout: parallel sizes; their product with the data-parallel size is the world size.
        seed: seed of dropout; each pipeline stage and each data- or context-parallel rank derives its own.
        timeout_seconds: time-out of a collective, in seconds.
    """
    destroy()
    parallel = _initialise(layout, timeout_seconds)
    part = parallel.dp_rank * layout.context + parallel.cp_rank  # of the tokens of a global batch
    torch.manual_seed(seed + part)
    model_parallel_cuda_manual_seed(seed + 100 * parallel.pp_rank + 10_000 * part, force_reset_rng=True)
    return parallel


def build_additional(first: ParallelContext, layout: Layout, timeout_seconds: int = 600) -> ParallelContext:
    """Creates another layout of the same world, for a model without random numbers; `first` stays active. Collective.

    Args:
        first: from `build`; its process groups are reused if `layout` has the same sizes.
        layout: parallel sizes; their product with the data-parallel size is the world size.
        timeout_seconds: time-out of a collective, in seconds.
    """
    if all(getattr(layout, name) == getattr(first.layout, name) for name in ("tensor", "pipeline", "context")):
        return replace(first, layout=layout)
    before, buffers = _state(), parallel_state._GLOBAL_MEMORY_BUFFER
    # Megatron only drops references to groups, but destroys gloo groups, which `first` needs to save its optimizer.
    vars(parallel_state).update({name: None for name in before if name.endswith("_GLOO")})
    destroy()
    try:
        return _initialise(layout, timeout_seconds)
    finally:
        vars(parallel_state).update(before)
        parallel_state._GLOBAL_MEMORY_BUFFER = buffers


def destroy() -> None:
    """Drops the process groups of the active layout; Megatron destroys only those over gloo."""
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
    """Megatron's module globals, except all-gather buffers, which the active layouts share."""
    found = {name: value for name, value in vars(parallel_state).items() if name[0] == "_" and name[1:2].isupper()}
    return {name: value for name, value in found.items() if "MEMORY_BUFFER" not in name}
