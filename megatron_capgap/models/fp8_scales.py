"""FP8 delayed-scaling state: saved and restored around forward passes that must not change it, and for checkpoints.

Transformer Engine stores this state in its modules' `_extra_state`, a pickle that 2.16.1 and releases from 2.17.1 on
refuse to load. Here it is stored as the tensors of `COUNTS`, which have the same names in 2.11 to 2.20.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from megatron_capgap.models.gpt import unwrap

PREFIX = "delayed_scaling."
"""Prefix of the keys of scales and histories in a checkpoint."""
COUNTS = {"scale_fwd": 3, "amax_history_fwd": 3, "scale_bwd": 2, "amax_history_bwd": 2}
"""Number of tensors of a linear that each covers: input, weight and output; gradients of output and input."""
# Keys of Transformer Engine's `fp8_meta`, by the suffix of the names above.
_PARTS = {"fwd": "scaling_fwd", "bwd": "scaling_bwd"}


class _Linear(Protocol):
    """What of Transformer Engine's linears is used here."""

    fp8_meta: dict[str, object]

    def init_fp8_meta_tensors(self, recipe: object, /) -> None:
        """Makes scales and histories."""


class DelayedScales:
    """Snapshot of the scales and amax histories; empty if no module uses delayed scaling.

    Transformer Engine records the amax of every forward pass in the histories, also without gradients, and the next
    training step computes scales from them.

    Args:
        chunks: this rank's model chunks.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._kept = [(tensor, tensor.clone()) for tensor in _tensors(chunks)]

    def restore(self) -> None:
        """Restores the snapshot in place: Transformer Engine keeps the tensors' addresses.

        Tensors that a module created after the snapshot, at its first forward pass, get their initial values: scales
        1, histories 0.
        """
        known = {id(tensor) for tensor, _ in self._kept}
        for tensor in _tensors(self._chunks):
            if id(tensor) not in known:
                tensor.fill_(1.0 if tensor.ndim == 1 else 0.0)
        for tensor, before in self._kept:
            tensor.copy_(before)


def _tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """Scales and histories of all modules that use delayed scaling."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        yield from state_of(module).values()


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Delayed-scaling state of a module, under the names of `COUNTS`: the tensors that Transformer Engine holds.

    For each of forward and backward: the scale `[n]` and the amax history `[steps, n]` of n tensors, fp32. Empty if the
    module has not run under delayed scaling.
    """
    found: dict[str, Tensor] = {}
    for end, part in _PARTS.items():
        state = getattr(module, "fp8_meta", {}).get(part)
        if state is not None and hasattr(state, "amax_history"):
            found |= {f"scale_{end}": state.scale, f"amax_history_{end}": state.amax_history}
    return found


@torch.no_grad()
def set_state(module: torch.nn.Module, state: Mapping[str, Tensor], recipe: object) -> None:
    """Sets the scales and histories of one of Transformer Engine's linears, before its first forward pass.

    Args:
        module: the linear.
        state: as `state_of` returns it, all four tensors.
        recipe: Transformer Engine's recipe that the module will use. If its history length differs, the newest entries
            are kept.
    """
    linear = cast("_Linear", module)
    linear.fp8_meta.setdefault("num_gemms", 1)  # not set before the first forward pass
    linear.fp8_meta["recipe"] = recipe
    linear.init_fp8_meta_tensors(recipe)
    for name, held in state_of(module).items():
        given = state[name].to(held.device)
        held.copy_(given if held.ndim == 1 else _of_length(given, len(held)))


def _of_length(history: Tensor, steps: int) -> Tensor:
    """Resizes a history to `[steps, n]`: row 0 accumulates the current step, rows 1 to the end run from old to new."""
    kept = history[max(1, len(history) - steps + 1) :]
    return torch.cat([history[:1], history.new_zeros(steps - 1 - len(kept), history.shape[1]), kept])


def linears(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """Transformer Engine's FP8 modules within the layers.

    Yields:
        The layer's index in the whole model, the module's name without that index (`decoder.layers.mlp.linear_fc1`),
        and the module.
    """
    for layer in (layer for chunk in chunks for layer in unwrap(chunk).decoder.layers):
        for name, module in layer.named_modules():
            if hasattr(module, "fp8_meta"):
                yield layer.layer_number - 1, f"decoder.layers.{name}", module
