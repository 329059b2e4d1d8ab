"""A model's layout as process groups: who holds which shard. The only reader of Megatron's `parallel_state`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_capgap.config.schema import Layout


@dataclass(frozen=True)
class Grid:
    """One layout over the whole world, seen from this rank."""

    layout: Layout
    groups: ProcessGroupCollection
    """Every process group that Megatron-Core's modules, schedules and optimizer ask for."""
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    data_size: int

    @property
    def on_first_stage(self) -> bool:
        """Whether this rank holds the input embedding."""
        return self.pipeline_rank == 0

    @property
    def on_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the LM head, and computes the loss."""
        return self.pipeline_rank == self.layout.pipeline - 1

    def sum_over_copies_and_stages(self, values: torch.Tensor) -> torch.Tensor:
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


def build(layout: Layout, seed: int, timeout_seconds: int = 600) -> Grid:
    """Makes the process groups of `layout` over the whole world. Collective.

    Virtual stages are not told to `parallel_state`: schedules and modules read them from the model's own config, so
    that a teacher without virtual stages can share the groups.

    Args:
        layout: sizes; their product with the data-parallel size is the world size.
        timeout_seconds: how long a collective may wait, in whole minutes.
        seed: decides dropout; every pipeline stage and data-parallel rank draws its own.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    data_rank = parallel_state.get_data_parallel_rank()
    torch.manual_seed(seed + data_rank)
    model_parallel_cuda_manual_seed(seed + 100 * pipeline_rank + 10_000 * data_rank, force_reset_rng=True)
    return Grid(
        layout=layout,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=pipeline_rank,
        data_rank=data_rank,
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def release() -> None:
    """Forgets every process group of every layout."""
    parallel_state.destroy_model_parallel()
