"""Scales of delayed FP8 scaling: histories of another length, and those that older checkpoints hold as pickles."""

import enum
import io
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_capgap.checkpoint import safe_unpickle
from megatron_capgap.checkpoint.fp8_scales import _check
from megatron_capgap.common.errors import UserError
from megatron_capgap.models.fp8_scales import _of_length

MODULE = "transformer_engine.common.recipe"


@pytest.mark.parametrize(
    "steps, kept", [(1, [9]), (2, [9, 3]), (3, [9, 2, 3]), (4, [9, 1, 2, 3]), (6, [9, 0, 0, 1, 2, 3])]
)
def test_a_history_of_another_length_keeps_what_is_newest(steps: int, kept: list[int]) -> None:
    history = torch.tensor([[9.0], [1.0], [2.0], [3.0]])
    assert _of_length(history, steps).flatten().tolist() == kept
    assert torch.equal(_of_length(history[:1], steps), torch.tensor([[9.0]] + [[0.0]] * (steps - 1)))


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    HYBRID = _FormatHelper(448.0, 57344.0)


@dataclass
class DelayedScaling:
    """As Transformer Engine's, with a field of a release that nobody has heard of."""

    fp8_format: Format = Format.HYBRID
    unheard_of: int = 7


class Stranger:
    pass


def pickled(monkeypatch: pytest.MonkeyPatch, recipe: object) -> torch.Tensor:
    """What Transformer Engine's `get_extra_state` gives; its own classes are gone afterwards."""
    state = {"recipe": recipe, "extra_fp8_variables": {"num_gemms": 1}}
    state |= {"scale_fwd": torch.arange(3.0), "amax_history_fwd": torch.ones(4, 3)}
    with monkeypatch.context() as patch:
        for name in ("transformer_engine", "transformer_engine.common", MODULE):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        for kind in (_FormatHelper, Format, DelayedScaling, Stranger):
            patch.setattr(kind, "__module__", MODULE)
            setattr(sys.modules[MODULE], kind.__name__, kind)
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def test_pickled_scales_are_read_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = safe_unpickle.load_scales(pickled(monkeypatch, DelayedScaling()))
    assert found.keys() == {"scale_fwd", "amax_history_fwd"}
    assert found["scale_fwd"].tolist() == [0.0, 1.0, 2.0] and found["amax_history_fwd"].shape == (4, 3)
    with pytest.raises(Exception, match=f"{MODULE}.Stranger"):
        safe_unpickle.load_scales(pickled(monkeypatch, Stranger()))


def test_tensors_that_newer_megatrons_pickled_are_read_by_our_own_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing one replaces `torch.storage._load_from_bytes`, by whose name tensors are pickled."""

    def safe_load_from_bytes(content: bytes) -> None:
        raise AssertionError("a stranger's function was called")

    class Stored:
        def __reduce__(self) -> tuple[object, ...]:
            return safe_load_from_bytes, (content.getvalue(),)

    torch.save(torch.arange(3.0), content := io.BytesIO())
    name = "megatron.core.safe_globals"
    safe_load_from_bytes.__module__, safe_load_from_bytes.__qualname__ = name, "safe_load_from_bytes"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].safe_load_from_bytes = safe_load_from_bytes
        held = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": Stored()})), dtype=torch.uint8)
    assert safe_unpickle.load_scales(held)["scale_fwd"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("held", [None, torch.empty(0, dtype=torch.uint8)])
def test_a_module_that_has_not_run_has_none(held: object) -> None:
    assert safe_unpickle.load_scales(held) == {}


SIZES = {"scale_fwd": (3,), "amax_history_fwd": (4, 3), "scale_bwd": (2,), "amax_history_bwd": (4, 2)}


@pytest.mark.parametrize(
    "part, size, text",
    [
        ("scale_fwd", (2,), "scale_fwd of fc1 is [2]"),
        ("scale_bwd", (1, 2), "scale_bwd of fc1 is [1, 2]"),
        ("amax_history_fwd", (3,), "amax_history_fwd of fc1 is [3]"),
        ("amax_history_bwd", (0, 2), "amax_history_bwd of fc1 is [0, 2]"),
        ("amax_history_bwd", None, "amax_history_bwd of fc1 is missing"),
    ],
)
def test_other_sizes_are_refused(part: str, size: tuple[int, ...] | None, text: str) -> None:
    _check(Path("step_2"), "fc1", SIZES)
    sizes = {name: one for name, one in {**SIZES, part: size}.items() if one is not None}
    with pytest.raises(UserError) as refused:
        _check(Path("step_2"), "fc1", sizes)
    assert str(refused.value) == f"step_2: {text}; use a checkpoint that this project wrote"
