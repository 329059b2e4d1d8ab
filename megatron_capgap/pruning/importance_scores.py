"""What the parts of a model are worth, in numbers, and the file that keeps them between two starts of a run."""

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
"""What scores depend on, by the keys of the configuration that say it."""


@dataclass(frozen=True)
class Scores:
    """Sums over micro-batches or tokens, float64, of the whole model; only ratios within one field mean something."""

    heads: Tensor
    """`[layers, heads]`."""
    groups: Tensor
    """`[layers, kv_heads]`: of all heads that share a key and a value, and of these."""
    neurons: Tensor
    """`[layers, ffn]`."""
    channels: Tensor
    """`[hidden]`: one score for all layers."""
    layers: Tensor
    """`[layers]`."""
    squares: Tensor
    """`[2 * layers + 1, hidden]`: squares behind each norm, before its gain; the norms of attention and feed-forward of
    each layer in turn, then the last one."""

    @classmethod
    def zeros(cls, shape: ModelShape, device: torch.device) -> Scores:
        """For a model that nothing is known of yet."""
        sizes = _sizes(shape)
        return cls(**{name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()})

    @classmethod
    def from_vector(cls, vector: Tensor, shape: ModelShape) -> Scores:
        """The inverse of `vector`."""
        sizes = _sizes(shape)
        parts = vector.split([torch.Size(size).numel() for size in sizes.values()])
        return cls(**{name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)})

    def vector(self) -> Tensor:
        """All numbers in a row, to be added up over ranks at once."""
        return torch.cat([getattr(self, field.name).flatten() for field in fields(self)])

    def normalised(self) -> Scores:
        """Each layer's heads, groups and neurons, and all channels, divided by their L2 norm, as the paper compares
        them."""
        scaled = {}
        for name in ("heads", "groups", "neurons", "channels"):
            rows = getattr(self, name)
            # The original's guard against a layer without any score.
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
    """Writes RUN/scores.json at once, in the place of an earlier one.

    Args:
        run_dir: of the run.
        scores: the sums so far.
        batches: global batches they are sums of.
        facts: what they depend on.
    """
    sums = {field.name: getattr(scores, field.name).tolist() for field in fields(scores)}
    content = {"format": FORMAT, "facts": dict(facts), "batches": batches, "sums": sums}
    write_atomically(run_dir / FILE, json.dumps(content) + "\n")


def read(run_dir: Path, shape: ModelShape, facts: Facts) -> tuple[Scores, int]:
    """The sums in RUN/scores.json and the number of global batches they hold; zeros and 0 where there is no such file.

    Raises:
        UserError: it is damaged, or was made from something else than `facts`.
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
        raise UserError(f"{path}: cannot be read ({error}); remove it, and the scores are made again") from None
    for key, value in facts.items():
        if known.get(key) != value:
            raise UserError(f"{path}: was made with {key} {known.get(key)}, not {value}; choose another run_dir")
    for name, size in _sizes(shape).items():
        if tuple(found[name].shape) != size:
            text = f"{name} is {list(found[name].shape)}, the teacher's is {list(size)}"
            raise UserError(f"{path}: {text}; remove it, and the scores are made again")
    return Scores(**found), batches
