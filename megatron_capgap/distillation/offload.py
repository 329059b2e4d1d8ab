"""Host offload of frozen weights: they are on the device only while they are used."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HostOffload:
    """Keeps weights in host memory, and copies them to the device within a `with` block.

    The weights are frozen, so the device's copies are dropped without copying back. If the device is the host, nothing
    is copied.

    Args:
        parameters: moved to host memory at construction.
        device: the device on which they are used.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._weights = [(parameter, _on_host(parameter.data, device)) for parameter in parameters]
        self.__exit__()

    def __enter__(self) -> None:
        for parameter, host in self._weights:
            parameter.data = self._on_device(host)

    def __exit__(self, *unused: object) -> None:
        for parameter, host in self._weights:
            parameter.data = host

    def _on_device(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self._device, non_blocking=True)


def _on_host(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy in pinned memory, from which a GPU copies directly; on a CPU the weight itself."""
    return weight.cpu().pin_memory() if device.type == "cuda" else weight
