"""What delayed scaling has learned, kept aside while a model runs over what is not to teach it anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


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
    """The scale `[n]` and the history `[steps, n]` of each module's n tensors, forward and backward; fp32."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        for part in ("scaling_fwd", "scaling_bwd"):
            state = getattr(module, "fp8_meta", {}).get(part)
            if hasattr(state, "amax_history"):
                yield state.scale
                yield state.amax_history
