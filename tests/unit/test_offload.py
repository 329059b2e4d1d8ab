"""Weights in host memory between a teacher's turns."""

import torch

from megatron_capgap.distillation.offload import HostOffload


class Elsewhere(HostOffload):
    """Its device is other memory of the same machine."""

    def _on_device(self, host: torch.Tensor) -> torch.Tensor:
        return host.clone()


def places(model: torch.nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_weights_visit_the_device_for_a_turn() -> None:
    model, given = torch.nn.Linear(3, 2).requires_grad_(False), torch.ones(1, 3)
    expected, weights = model(given), Elsewhere(model.parameters(), torch.device("cpu"))
    host = places(model)
    for _ in range(2):
        with weights:
            assert not set(places(model)) & set(host), "copies on the device"
            assert torch.equal(model(given), expected)
            model.weight.data.zero_()  # what happens to the copies is not kept
        assert places(model) == host and torch.equal(model(given), expected)


def test_on_a_cpu_nothing_moves() -> None:
    model = torch.nn.Linear(3, 2)
    before = places(model)
    with HostOffload(model.parameters(), torch.device("cpu")):
        assert places(model) == before
    assert places(model) == before
