"""Pruning plan: the parts of the teacher that are kept, and the human-readable plan.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_capgap.config import derived
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import size
from megatron_capgap.pruning.importance_scores import Facts, Scores
from megatron_capgap.pruning.student_shape import Budget

FILE = "plan.json"

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PruningSelection:
    """The kept parts, numbered from 0 as in the teacher and ascending; one row per kept layer."""

    teacher: ModelShape
    student: ModelShape
    layers: tuple[int, ...]
    channels: tuple[int, ...]
    kv_heads: Rows
    """Key/value heads."""
    heads: Rows
    """Query heads, those of a group next to each other."""
    neurons: Rows
    gains: tuple[float, ...]
    """Factors of the norms' gains: attention and feed-forward of each layer in turn, then the final norm. Removing
    channels changes the root mean square that a norm divides by; the factors compensate for it."""
    tensor: int = 1
    """Tensor-parallel size over which a layer's parts are spread if it keeps fewer than the student stores."""

    @property
    def kept_parts(self) -> dict[str, list[int]]:
        """Number of parts that each layer keeps, by their name in a shape."""
        rows = {"kv_heads": self.kv_heads, "heads": self.heads, "ffn": self.neurons}
        return {name: [len(row) for row in parts] for name, parts in rows.items()}

    @property
    def padding(self) -> int:
        """Number of parameters that are zero because a layer keeps fewer parts than the student stores."""
        kept = [sum(map(len, rows)) for rows in (self.kv_heads, self.neurons)]
        return size.non_embedding_parameters(self.student) - size.kept_parameters(self.student, *kept)


def make(
    teacher: ModelShape, student: ModelShape, scores: Scores, layers_by: str, budget: Budget | None = None
) -> PruningSelection:
    """Keeps the parts with the highest scores.

    Args:
        teacher, student: the shapes before and after; with a budget the selection's student stores as many parts as its
            largest layer keeps.
        scores: of the teacher.
        layers_by: `position` keeps the middle layers, `importance` those with the highest scores.
        budget: number of parts kept in all layers together, ranked over all layers; None keeps the student's number in
            each layer.
    """
    if layers_by == "importance":
        layers = _best(scores.layers, student.layers)
    else:
        first = (teacher.layers - student.layers) // 2
        layers = tuple(range(first, first + student.layers))
    channels = _best(scores.channels, student.hidden)
    tensor = 1
    if budget is None:
        kv_heads = tuple(_best(scores.groups[layer], derived.kv_heads(student)) for layer in layers)
        neurons = tuple(_best(scores.neurons[layer], student.ffn) for layer in layers)
    else:
        scaled, tensor = scores.normalised(), budget.tensor
        kv_heads = _best_over_layers(scaled.groups[list(layers)], 1, budget.kv_heads, budget.storable_kv_heads[-1])
        neurons = _best_over_layers(scaled.neurons[list(layers)], budget.unit, budget.neurons, budget.max_neurons)
        student = _storing(student, budget.smallest_storable(max(map(len, kv_heads))), max(map(len, neurons)))
    norms = [norm for layer in layers for norm in (2 * layer, 2 * layer + 1)]
    return PruningSelection(
        teacher=teacher,
        student=student,
        layers=layers,
        channels=channels,
        kv_heads=kv_heads,
        heads=tuple(_heads(teacher, student, scores.heads[i], kept) for i, kept in zip(layers, kv_heads, strict=True)),
        neurons=neurons,
        gains=tuple(_gain(scores.squares[norm], channels) for norm in [*norms, 2 * teacher.layers]),
        tensor=tensor,
    )


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` highest scores, ascending; among equal scores the first."""
    order = scores.sort(descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def _best_over_layers(scores: Tensor, unit: int, total: int, max_parts: int) -> Rows:
    """The best parts of all layers together.

    Args:
        scores: `[layers, parts]`, comparable between layers.
        unit: each layer keeps a multiple of this number of parts, at least one unit.
        total: parts kept in all layers together, a multiple of unit.
        max_parts: maximum number of parts kept in one layer, a multiple of unit.
    """
    ranked = scores.sort(dim=1, descending=True, stable=True)
    # A layer's units group its parts in descending order of score, so the best units overall are each layer's first.
    units = ranked.values[:, :max_parts].unflatten(1, (-1, unit)).sum(-1)
    units[:, 0] = torch.inf
    chosen = Counter(i // units.shape[1] for i in _best(units.flatten(), total // unit))
    return tuple(tuple(sorted(row[: chosen[i] * unit].tolist())) for i, row in enumerate(ranked.indices))


def _storing(student: ModelShape, kv_heads: int, neurons: int) -> ModelShape:
    """The student with `groups` key/value heads and `neurons` neurons per layer; head width and queries per group are
    unchanged."""
    stored, head_dim = derived.kv_heads(student), derived.head_dim(student)
    if kv_heads != stored:
        heads = kv_heads * student.heads // stored
        student = replace(student, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return replace(student, ffn=neurons)


def pad_per_shard(kept: Sequence[int], stored: int, shards: int) -> list[int]:
    """Positions of a layer's kept parts within the stored width; -1 is a position of zeros.

    The position of padding does not affect its cost, and every layout can load it. In the configured layout each shard
    gets the same number of kept parts, up to one, so that the work is balanced over ranks if the zeros are removed.

    Args:
        kept: parts, ascending, at most `stored`.
        stored: number of stored parts, a multiple of `shards`.
        shards: tensor-parallel size.
    """
    rows: list[int] = []
    for shard in range(shards):
        mine = kept[len(kept) * shard // shards : len(kept) * (shard + 1) // shards]
        rows += [*mine, *[-1] * (stored // shards - len(mine))]
    return rows


def _heads(teacher: ModelShape, student: ModelShape, scores: Tensor, kv_heads: tuple[int, ...]) -> tuple[int, ...]:
    """The best query heads of each kept group, equally many of each."""
    queries = teacher.heads // derived.kv_heads(teacher)
    count = student.heads // derived.kv_heads(student)
    return tuple(g * queries + i for g in kv_heads for i in _best(scores[g * queries : (g + 1) * queries], count))


def _gain(squares: Tensor, channels: tuple[int, ...]) -> float:
    """Ratio of the root mean square of a norm's output over the kept channels to that over all channels.

    It is 1 if all channels are kept. If the removed channels were always 0, it makes their removal exact.
    """
    if len(channels) == len(squares) or not squares.sum() > 0:
        return 1.0
    return float((squares[list(channels)].mean() / squares.mean()).sqrt())


def text(selection: PruningSelection, scores: Scores, facts: Facts) -> str:
    """Contents of plan.json, with one line per row of numbers.

    Args:
        selection: the kept parts.
        scores: the scores that it was made from.
        facts: the settings that the scores depend on.
    """
    names = {"layers": "layers", "channels": "channels", "groups": "kv_heads", "heads": "heads", "neurons": "neurons"}
    kept = {key: getattr(selection, name) for key, name in names.items()}
    scaled = scores.normalised()
    content = {
        "made_from": dict(facts),
        "before": asdict(selection.teacher),
        "after": asdict(selection.student),
        "stays": kept,
        "norm_gains": selection.gains,
        "kept_by_layer": selection.kept_parts,
        "parameters": {
            "kept": size.parameters(selection.student) - selection.padding,
            "stored": size.parameters(selection.student),
            "kept_non_embedding": size.non_embedding_parameters(selection.student) - selection.padding,
            "stored_non_embedding": size.non_embedding_parameters(selection.student),
        },
        "scores": {
            field.name: _short(getattr(scaled, field.name)) for field in fields(scaled) if field.name != "squares"
        },
    }
    return "\n".join(_lines(content, "")) + "\n"


def _short(scores: Tensor) -> list[Any]:
    """Each number rounded to six digits."""
    if scores.dim() == 2:
        return [_short(row) for row in scores]
    return [float(f"{score:.6g}") for score in scores.tolist()]


def _lines(value: Any, indent: str) -> Iterator[str]:
    """JSON lines: containers that hold other containers are spread over lines, plain lists take one line each."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple) or not any(isinstance(one, dict | list | tuple) for one in inner):
        yield json.dumps(value)
        return
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    yield opening
    for number, (name, one) in enumerate(zip(names, inner, strict=True), start=1):
        first, *rest = _lines(one, indent + " ")
        last = [*[f"{indent} {name}{first}"], *rest]
        last[-1] += "," if number < len(inner) else ""
        yield from last
    yield f"{indent}{closing}"
