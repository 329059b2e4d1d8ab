"""Which parts of the teacher stay: the plan, and its file, made to be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from megatron_capgap.config import derive
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.pruning.scores import Facts, Scores

FILE = "plan.json"

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """What stays, numbered from 0 as in the teacher and ascending; a row for each layer that stays."""

    teacher: ModelShape
    student: ModelShape
    layers: tuple[int, ...]
    channels: tuple[int, ...]
    groups: Rows
    """Key/value heads."""
    heads: Rows
    """Query heads, those of a group beside each other."""
    neurons: Rows
    gains: tuple[float, ...]
    """Factors of the norms' gains: attention and feed-forward of each layer in turn, then the last norm. A norm divides
    by the root mean square of the channels it is given; those that stay may be larger or smaller than all were."""


def make(teacher: ModelShape, student: ModelShape, scores: Scores, layers_by: str) -> Plan:
    """Takes the best of everything.

    Args:
        teacher, student: the shapes before and after.
        scores: of the teacher.
        layers_by: `position` keeps the middle layers, `importance` those of the highest scores.
    """
    if layers_by == "importance":
        layers = _best(scores.layers, student.layers)
    else:
        first = (teacher.layers - student.layers) // 2
        layers = tuple(range(first, first + student.layers))
    channels = _best(scores.channels, student.hidden)
    groups = tuple(_best(scores.groups[layer], derive.kv_heads(student)) for layer in layers)
    norms = [norm for layer in layers for norm in (2 * layer, 2 * layer + 1)]
    return Plan(
        teacher=teacher,
        student=student,
        layers=layers,
        channels=channels,
        groups=groups,
        heads=tuple(_heads(teacher, student, scores.heads[i], kept) for i, kept in zip(layers, groups, strict=True)),
        neurons=tuple(_best(scores.neurons[layer], student.ffn) for layer in layers),
        gains=tuple(_gain(scores.squares[norm], channels) for norm in [*norms, 2 * teacher.layers]),
    )


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    """Where the `count` highest scores stand, ascending; of equal ones the first."""
    order = scores.sort(descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def _heads(teacher: ModelShape, student: ModelShape, scores: Tensor, groups: tuple[int, ...]) -> tuple[int, ...]:
    """The best queries of each group that stays, as many of each."""
    queries = teacher.heads // derive.kv_heads(teacher)
    count = student.heads // derive.kv_heads(student)
    return tuple(g * queries + i for g in groups for i in _best(scores[g * queries : (g + 1) * queries], count))


def _gain(squares: Tensor, channels: tuple[int, ...]) -> float:
    """Root mean square behind a norm over the channels that stay, to that over all: 1 where all stay, and for channels
    that were always 0 what makes their going unseen."""
    if len(channels) == len(squares) or not squares.sum() > 0:
        return 1.0
    return float((squares[list(channels)].mean() / squares.mean()).sqrt())


def globally_ranked(plan: Plan, scores: Scores) -> dict[str, list[int]]:
    """How many heads and neurons each of the teacher's layers would keep, were they ranked over all layers at once by
    normalised scores, as in the paper's pilot; the plan keeps as many in each layer."""
    found, scaled = {}, scores.normalised()
    for name, a_layer in (("heads", plan.student.heads), ("neurons", plan.student.ffn)):
        rows = getattr(scaled, name)
        kept = _best(rows.flatten(), a_layer * len(rows))
        found[name] = [sum(i // rows.shape[1] == layer for i in kept) for layer in range(len(rows))]
    return found


def text(plan: Plan, scores: Scores, facts: Facts) -> str:
    """plan.json: a line for each row of numbers.

    Args:
        plan: what stays.
        scores: why.
        facts: what the scores were made from.
    """
    kept = {name: getattr(plan, name) for name in ("layers", "channels", "groups", "heads", "neurons")}
    scaled = scores.normalised()
    content = {
        "made_from": dict(facts),
        "before": asdict(plan.teacher),
        "after": asdict(plan.student),
        "stays": kept,
        "norm_gains": plan.gains,
        "globally_ranked": globally_ranked(plan, scores),
        "scores": {
            field.name: _short(getattr(scaled, field.name)) for field in fields(scaled) if field.name != "squares"
        },
    }
    return "\n".join(_lines(content, "")) + "\n"


def _short(scores: Tensor) -> list[Any]:
    """Six digits of each number."""
    if scores.dim() == 2:
        return [_short(row) for row in scores]
    return [float(f"{score:.6g}") for score in scores.tolist()]


def _lines(value: Any, indent: str) -> Iterator[str]:
    """JSON with what holds other lists or sections spread over lines, and plain lists in one line each."""
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
