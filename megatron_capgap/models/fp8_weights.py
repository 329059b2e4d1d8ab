"""FP8 parameters: Transformer Engine's quantised tensors in place of bf16 parameters."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, is_main_replica
from megatron.core.fp8_utils import dequantize_fp8_tensor, get_fp8_context, is_float8tensor
from torch import Tensor

from megatron_capgap.config.schema import Precision
from megatron_capgap.models.gpt import unwrap


class _Quantizer(Protocol):
    """What of Transformer Engine's quantisers is used here."""

    internal: bool

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        """Which copies it makes."""

    def __call__(self, tensor: Tensor, /) -> Tensor: ...


class _InitMeta(Protocol):
    """What a module of Transformer Engine's notes of a parameter."""

    fp8_meta_index: int | None


class _QuantisedModule(Protocol):
    """What of Transformer Engine's modules is used here."""

    fp8_parameters: bool
    primary_weights_in_fp8: bool
    param_init_meta: Mapping[str, _InitMeta]
    quantizers: Mapping[str, Sequence[_Quantizer]]

    def init_fp8_metadata(self) -> None:
        """Makes its quantisers."""

    def named_parameters(self, *, recurse: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """torch's."""


def cast_params_to_fp8(
    chunks: Sequence[torch.nn.Module], precision: Precision, *, backward: bool = False, masters: bool = False
) -> None:
    """Casts the weights of all linears that multiply in FP8, if `precision.fp8.param_gather` is set; the FP8 tensors
    replace the parameters.

    Call it after the weights are filled, and before DDP or an optimizer refers to the parameters. Transformer Engine
    could create FP8 parameters at construction, but would cast values that are overwritten later, with kernels that do
    not exist for a model in host memory.

    Args:
        chunks: this rank's model chunks, in bf16.
        precision: the model's.
        backward: whether gradients of inputs will be computed; these need a transposed copy of each weight.
        masters: keeps the exact weights in host memory until Megatron's optimizer has created its fp32 master weights.
    """
    if precision.fp8 is None or not precision.fp8.param_gather:
        return
    for chunk in map(unwrap, chunks):
        config = chunk.config
        config.fp8_param = True  # set only now: set earlier, Megatron would have built FP8 parameters
        for layer in chunk.decoder.layers:
            with get_fp8_context(config, layer.layer_number - 1, is_init=True):
                for module in layer.modules():
                    if hasattr(module, "primary_weights_in_fp8"):
                        _cast(typing.cast("_QuantisedModule", module), backward=backward, masters=masters)


@torch.no_grad()
def _cast(module: _QuantisedModule, *, backward: bool, masters: bool) -> None:
    """Casts one module's weights as Transformer Engine does at construction, without reinitialising them."""
    module.init_fp8_metadata()
    if not module.fp8_parameters:
        return  # one of the layers that stay in bf16
    module.primary_weights_in_fp8 = True
    for name, parameter in list(module.named_parameters(recurse=False)):
        index = module.param_init_meta[name].fp8_meta_index
        if index is None:
            continue
        quantizer = module.quantizers["scaling_fwd"][index]
        quantizer.set_usage(rowwise=True, columnwise=backward)
        quantizer.internal = False
        held = torch.nn.Parameter(quantizer(parameter.detach()), requires_grad=parameter.requires_grad)
        for mark, value in vars(parameter).items():
            setattr(held, mark, value)
        if masters:
            _keep_exact(held, parameter.detach().cpu())
        setattr(module, name, held)


def _keep_exact(held: torch.nn.Parameter, exact: Tensor) -> None:
    """Adds the two methods through which Megatron's optimizer reads the exact values of FP8 parameters."""
    kept = [exact]
    held.get_high_precision_init_val = lambda: kept[0]  # type: ignore[attr-defined]
    held.clear_high_precision_init_val = kept.clear  # type: ignore[attr-defined]


def in_compute_type(state: ShardedStateDict) -> ShardedStateDict:
    """A sharded state as the target of a load, with FP8 weights replaced by tensors of the dtype they represent."""
    return _in_compute_type(state, lambda shard: dequantize_fp8_tensor(shard.data.detach()))


def written_in_compute_type(state: ShardedStateDict) -> ShardedStateDict:
    """A sharded state to be saved, with FP8 weights replaced by copies in the dtype they represent.

    Any run and any tool can load these. The copies are made one at a time in host memory, because on a GPU they would
    take the memory that FP8 weights save; they are empty where another rank writes the tensor.
    """

    def copied(shard: ShardedBase) -> Tensor:
        if not is_main_replica(shard.replica_id):
            return torch.empty(shard.data.shape, dtype=shard.data.dtype, device="meta")
        return dequantize_fp8_tensor(shard.data.detach()).cpu()

    return _in_compute_type(state, copied)


def _in_compute_type(state: ShardedStateDict, made: Callable[[ShardedBase], Tensor]) -> ShardedStateDict:
    def plain(shard: ShardedBase) -> ShardedBase:
        return replace(shard, data=made(shard)) if is_float8tensor(shard.data) else shard

    return dict_list_map_outplace(plain, state)
