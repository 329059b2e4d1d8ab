"""Importance scores of a model's parts, and the file scores.json that stores them for a resumed run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_capgap.common.errors import UserError
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.config import derived
from megatron_capgap.config.schema import ModelShape

FILE = "scores.json"
FORMAT = 1

Facts = Mapping[str, Any]
"""The settings that scores depend on, by their configuration keys."""


@dataclass(frozen=True)
class Scores:
    """Sums over micro-batches or tokens, float64, of the whole model; only ratios within one field are meaningful."""

    heads: Tensor
    """`[layers, heads]`."""
    groups: Tensor
    """`[layers, kv_heads]`: of all query heads that share a key and a value, together with these."""
    neurons: Tensor
    """`[layers, ffn]`."""
    channels: Tensor
    """`[hidden]`: one score for all layers."""
    layers: Tensor
    """`[layers]`."""
    squares: Tensor
    """`[2 * layers + 1, hidden]`: squares of each norm's output before its gain; the norms of attention and
    feed-forward of each layer in turn, then the final norm."""

    @classmethod
    def zeros(cls, shape: ModelShape, device: torch.device) -> Scores:
        """Scores of 0 for a model of this shape."""
        sizes = _sizes(shape)
        return cls(**{name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()})

    @classmethod
    def from_vector(cls, vector: Tensor, shape: ModelShape) -> Scores:
        """The inverse of `vector`."""
        sizes = _sizes(shape)
        parts = vector.split([torch.Size(size).numel() for size in sizes.values()])
        return cls(**{name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)})

    def vector(self) -> Tensor:
        """All numbers as one vector, to be summed over ranks in one collective."""
        return torch.cat([getattr(self, field.name).flatten() for field in fields(self)])

    def normalised(self) -> Scores:
        """Scores divided by their L2 norm, as in the paper: per layer for heads, groups and neurons, over all channels
        for hidden."""
        scaled = {}
        for name in ("heads", "groups", "neurons", "channels"):
            rows = getattr(self, name)
            # The original implementation's guard against a layer whose scores are all 0.
            scaled[name] = rows / (rows.norm(dim=-1, keepdim=True) + 1e-17)
        return Scores(**{**vars(self), **scaled})


def _sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        "heads": (shape.layers, shape.heads),
        "groups": (shape.layers, derived.kv_heads(shape)),
        "neurons": (shape.layers, shape.ffn),
        "channels": (shape.hidden,),
        "layers": (shape.layers,),
        "squares": (2 * shape.layers + 1, shape.hidden),
    }


def write(run_dir: Path, scores: Scores, batches: int, facts: Facts) -> None:
    """Writes RUN/scores.json atomically, replacing an earlier one.

    Args:
        run_dir: of the run.
        scores: the sums so far.
        batches: number of global batches summed.
        facts: the settings that the scores depend on.
    """
    sums = {field.name: getattr(scores, field.name).tolist() for field in fields(scores)}
    content = {"format": FORMAT, "facts": dict(facts), "batches": batches, "sums": sums}
    write_atomically(run_dir / FILE, json.dumps(content) + "\n")


def read(run_dir: Path, shape: ModelShape, facts: Facts) -> tuple[Scores, int]:
    """The sums in RUN/scores.json and the number of global batches summed; zeros and 0 if there is no such file.

    Raises:
        UserError: the file is damaged, or was computed with settings other than `facts`.
    """
    path = run_dir / FILE
    nothing = Scores.zeros(shape, torch.device("cpu"))
    if not path.is_file():
        return nothing, 0
    try:
        content = json.loads(path.read_text())
        known, batches, sums = content["facts"], int(content["batches"]), content["sums"]
        found = {name: torch.tensor(sums[name], dtype=torch.float64) for name in _sizes(shape)}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to recompute the scores") from None
    for key, value in facts.items():
        if known.get(key) != value:
            raise UserError(f"{path}: was computed with {key} {known.get(key)}, not {value}; choose another run_dir")
    for name, size in _sizes(shape).items():
        if tuple(found[name].shape) != size:
            text = f"{name} is {list(found[name].shape)}, the teacher's is {list(size)}"
            raise UserError(f"{path}: {text}; remove it to recompute the scores")
    return Scores(**found), batches
