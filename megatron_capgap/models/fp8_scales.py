"""What delayed scaling has learned: kept aside while a model is not to learn, and named for checkpoints.

Transformer Engine would put it into its modules' `_extra_state`, as a pickle that it refuses to read back in 2.16.1 and
from 2.17.1 on. Here it is the tensors of `COUNTS`, which 2.11 to 2.20 keep under the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from megatron_capgap.models.gpt import unwrap

PREFIX = "delayed_scaling."
"""What the keys of scales and histories in a checkpoint begin with."""
COUNTS = {"scale_fwd": 3, "amax_history_fwd": 3, "scale_bwd": 2, "amax_history_bwd": 2}
"""How many tensors of a linear each speaks of: input, weight and output; gradients of output and input."""
# Transformer Engine's parts of a module's state, by how our names end.
_PARTS = {"fwd": "scaling_fwd", "bwd": "scaling_bwd"}


class _Linear(Protocol):
    """What of Transformer Engine's linears is used here."""

    fp8_meta: dict[str, object]

    def init_fp8_meta_tensors(self, recipe: object, /) -> None:
        """Makes scales and histories."""


class DelayedScales:
    """Scales and histories of largest values as they are now; nothing where no module delays its scales.

    Transformer Engine writes the largest values of every forward pass into the histories, without a gradient too, and
    the next training step makes scales of them.

    Args:
        chunks: this rank's model chunks.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._kept = [(tensor, tensor.clone()) for tensor in _tensors(chunks)]

    def restore(self) -> None:
        """Makes them what they were, in place: Transformer Engine has noted where they lie.

        Those that a module has made in the meantime, at its first forward pass, go back to where they began.
        """
        known = {id(tensor) for tensor, _ in self._kept}
        for tensor in _tensors(self._chunks):
            if id(tensor) not in known:
                tensor.fill_(1.0 if tensor.ndim == 1 else 0.0)
        for tensor, before in self._kept:
            tensor.copy_(before)


def _tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """Scales and histories of all modules that delay their scales."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        yield from state_of(module).values()


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """By the names of `COUNTS`, the scale `[n]` and the history `[steps, n]` of a module's n tensors, forward and
    backward, fp32, as Transformer Engine holds them; nothing where the module has not run under delayed scaling."""
    found: dict[str, Tensor] = {}
    for end, part in _PARTS.items():
        state = getattr(module, "fp8_meta", {}).get(part)
        if state is not None and hasattr(state, "amax_history"):
            found |= {f"scale_{end}": state.scale, f"amax_history_{end}": state.amax_history}
    return found


@torch.no_grad()
def set_state(module: torch.nn.Module, state: Mapping[str, Tensor], recipe: object) -> None:
    """Gives one of Transformer Engine's linears the scales and histories of `state_of`, before it runs.

    Args:
        module: the linear.
        state: all four.
        recipe: Transformer Engine's, that the module will run under. A history of another length keeps what is newest.
    """
    linear = cast("_Linear", module)
    linear.fp8_meta.setdefault("num_gemms", 1)  # which a module that has not run does not know
    linear.fp8_meta["recipe"] = recipe
    linear.init_fp8_meta_tensors(recipe)
    for name, held in state_of(module).items():
        given = state[name].to(held.device)
        held.copy_(given if held.ndim == 1 else _of_length(given, len(held)))


def _of_length(history: Tensor, steps: int) -> Tensor:
    """A history `[steps, n]` out of one of another length: row 0 collects, the rows after it grow newer to the end."""
    kept = history[max(1, len(history) - steps + 1) :]
    return torch.cat([history[:1], history.new_zeros(steps - 1 - len(kept), history.shape[1]), kept])


def linears(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """Transformer Engine's modules within the layers: a layer's index in the whole model, the module's name without
    it (`decoder.layers.mlp.linear_fc1`), the module."""
    for layer in (layer for chunk in chunks for layer in unwrap(chunk).decoder.layers):
        for name, module in layer.named_modules():
            if hasattr(module, "fp8_meta"):
                yield layer.layer_number - 1, f"decoder.layers.{name}", module
