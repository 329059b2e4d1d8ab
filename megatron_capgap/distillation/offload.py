"""Frozen weights that visit the device only while they are needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HostOffload:
    """Keeps weights in host memory, and copies them to the device within a `with` block.

    They are frozen, so that nothing comes back: the device's copies are dropped. Where the device is the host, they
    stay where they are.

    Args:
        parameters: leave the device at once.
        device: where they are needed.
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
    """A copy in pages that a GPU can read by itself; on a CPU the weight as it is."""
    return weight.cpu().pin_memory() if device.type == "cuda" else weight
