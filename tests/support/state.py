"""A run's state as bytes, to be compared, and gradients that no run survives."""

from typing import Any

import torch


class Poison(torch.autograd.Function):
    """Leaves a tensor as it is and makes NaN of its gradient."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def state_of(run: Any) -> list[bytes]:
    """This rank's weights, and Adam's moments and step counters."""
    parts = [parameter.detach() for chunk in run.chunks for parameter in chunk.parameters()]
    for part in run.optimization.optimizer.chained_optimizers:
        parts += [entry[name].detach() for entry in part.optimizer.state.values() for name in sorted(entry)]
    return [tensor.numpy().tobytes() for tensor in parts]
