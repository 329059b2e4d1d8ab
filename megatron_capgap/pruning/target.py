"""The shape of the student that the section `prune` asks for, from the teacher's shape alone. No torch.

A Megatron model has one width for all its layers, so counts are uniform over layers, as in the paper's conversion of
LLaMA2-7B; its pilot's counts, which differ from layer to layer, no single shape could hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_capgap.config import derive
from megatron_capgap.config.case import divisors, multiples, spans
from megatron_capgap.config.errors import ConfigError
from megatron_capgap.config.families import FAMILIES
from megatron_capgap.config.load import Loaded
from megatron_capgap.config.schema import ModelShape, Prune
from megatron_capgap.models import size

_WIDTHS = ("hidden", "heads", "kv_heads", "ffn")
# Beyond this a shape is no answer to the number of parameters that was asked for.
_FARTHEST = 0.25
_SHARES = 2000  # steps of the share by which the widths are cut


@dataclass(frozen=True)
class Order:
    """What is to be cut out of what."""

    loaded: Loaded
    teacher: ModelShape
    path: str
    """The teacher's checkpoint, as messages name it."""

    @property
    def wanted(self) -> Prune:
        """The section."""
        assert self.loaded.config.prune is not None, "load refuses a prune configuration without the section"
        return self.loaded.config.prune

    @property
    def queries(self) -> int:
        """The teacher's queries to a group."""
        return self.teacher.heads // derive.kv_heads(self.teacher)

    def problem(self, key: str, text: str) -> str:
        """One finished sentence about `prune.key`."""
        return f"{self.loaded.place(f'prune.{key}' if key else 'prune')}: {text}"


def student_shape(loaded: Loaded, teacher: ModelShape) -> ModelShape:
    """The student's shape.

    Args:
        loaded: of the stage prune.
        teacher: the shape found in teacher.checkpoint.

    Raises:
        ConfigError: with one line for every problem.
    """
    assert loaded.config.teacher is not None, "load refuses a prune configuration without a teacher"
    order = Order(loaded, teacher, loaded.config.teacher.checkpoint)
    # Each row supposes that the ones before it found nothing.
    for row in _CHECKS:
        if problems := list(row(order)):
            raise ConfigError(problems)
    found = _chosen(order)
    if _numbers(found) == _numbers(teacher):
        text = f"leaves {order.path} as it is; a smaller layers, hidden, heads or ffn would do, or a larger sparsity"
        raise ConfigError([order.problem("", text)])
    return found


def _chosen(order: Order) -> ModelShape:
    wanted, teacher = order.wanted, order.teacher
    if wanted.sparsity is not None:
        # A weight lies between two of hidden, heads and ffn: it stays where both of its ends stay.
        return _cut(order, math.sqrt(1.0 - wanted.sparsity))
    if wanted.parameters is not None:
        return _of_parameters(order, wanted.parameters)
    return _shape(order, wanted.hidden or teacher.hidden, *_attention(order), wanted.ffn or teacher.ffn)


def _numbers(shape: ModelShape) -> tuple[int, ...]:
    return shape.layers, shape.hidden, shape.heads, derive.kv_heads(shape), shape.ffn


def _attention(order: Order) -> tuple[int, int]:
    """Heads and groups that the numbers come to."""
    wanted, teacher = order.wanted, order.teacher
    if wanted.heads is None and wanted.kv_heads is None:
        return teacher.heads, derive.kv_heads(teacher)
    heads = wanted.heads or (wanted.kv_heads or 0) * order.queries
    return heads, wanted.kv_heads or heads // order.queries


def _shape(order: Order, hidden: int, heads: int, kv_heads: int, ffn: int) -> ModelShape:
    teacher, width = order.teacher, derive.head_dim(order.teacher)
    return replace(
        teacher,
        layers=order.wanted.layers or teacher.layers,
        hidden=hidden,
        heads=heads,
        kv_heads=None if teacher.kv_heads is None and kv_heads == heads else kv_heads,
        head_dim=teacher.head_dim if heads * width == hidden else width,
        ffn=ffn,
        # Where only dead channels go, a norm's mean square grows by teacher.hidden / hidden, and its epsilon must too.
        norm_epsilon=teacher.norm_epsilon * (teacher.hidden / hidden),
    )


def _cut(order: Order, share: float) -> ModelShape:
    """Hidden, heads and ffn cut to a share of the teacher's, in units that the layout divides."""
    wanted, teacher, tensor = order.wanted, order.teacher, order.loaded.config.student.layout.tensor
    traits, width = FAMILIES[teacher.family], derive.head_dim(teacher)
    groups = _nearest(share * derive.kv_heads(teacher), tensor, derive.kv_heads(teacher))
    heads = groups * order.queries
    unit = math.lcm(wanted.multiple, heads) if traits.heads_divide_hidden else wanted.multiple
    hidden = _nearest(share * teacher.hidden, unit, teacher.hidden) if traits.free_head_dim else heads * width
    ffn = _nearest(share * teacher.ffn, math.lcm(wanted.multiple, tensor), teacher.ffn)
    return _shape(order, hidden, heads, groups, ffn)


def _nearest(number: float, unit: int, most: int) -> int:
    """The multiple of `unit` nearest to a number, at least one; `most` itself where no multiple fits below it."""
    return min(max(1, round(number / unit)) * unit, most // unit * unit or most)


def _of_parameters(order: Order, parameters: int) -> ModelShape:
    """The shape whose parameters without embeddings come nearest, of all that cut the widths by one share."""
    shapes = {_cut(order, share / _SHARES): None for share in range(1, _SHARES + 1)}

    def distance(shape: ModelShape) -> int:
        return abs(size.non_embedding_parameters(shape) - parameters)

    best = min(shapes, key=distance)
    if distance(best) > _FARTHEST * parameters:
        found = size.non_embedding_parameters(best)
        text = f"{parameters} is not near any shape; {found} would do, or a smaller prune.multiple, or fewer layers"
        raise ConfigError([order.problem("parameters", text)])
    return best


def _one_way_of_saying_it(order: Order) -> Iterator[str]:
    """Numbers, a sparsity or a count of parameters; layers may stand beside each."""
    wanted, config = order.wanted, order.loaded.config
    widths = [name for name in _WIDTHS if getattr(wanted, name) is not None]
    totals = [name for name in ("sparsity", "parameters") if getattr(wanted, name) is not None]
    if len(totals) == 2:
        text = f"{wanted.parameters} given beside prune.sparsity {wanted.sparsity}; give one of them"
        yield order.problem("parameters", text)
    for name in widths if totals else ():
        text = f"{getattr(wanted, name)} given beside prune.{totals[0]}, which chooses the widths; give one of them"
        yield order.problem(name, text)
    if not widths and not totals and wanted.layers is None:
        text = "says nothing of the student's size; give layers, hidden, heads and ffn, or sparsity, or parameters"
        yield order.problem("", text)
    if config.teacher is not None and config.teacher.layout is not None:
        yield f"{order.loaded.place('teacher.layout')}: prune cuts the teacher as student.layout says; remove the key"


def _the_student_lies_within_the_teacher(order: Order) -> Iterator[str]:
    """Nothing can be pruned to a larger size."""
    for name in ("layers", *_WIDTHS):
        given = getattr(order.wanted, name)
        most = derive.kv_heads(order.teacher) if name == "kv_heads" else getattr(order.teacher, name)
        if given is not None and given > most:
            text = f"{given} is larger than {name} {most} of {order.path}; {spans(range(1, most + 1))} would do"
            yield order.problem(name, text)
    parameters, most = order.wanted.parameters, size.non_embedding_parameters(order.teacher)
    if parameters is not None and parameters >= most:
        text = f"{parameters} is not below the {most} of {order.path} without embeddings; {round(most / 2.5)} would do"
        yield order.problem("parameters", text)


def _groups_hold_as_many_queries(order: Order) -> Iterator[str]:
    """Queries stay with the key and value that they were trained with."""
    wanted, queries, (heads, kv_heads) = order.wanted, order.queries, _attention(order)
    if wanted.kv_heads is None:
        if heads % queries:
            text = f"{heads} heads do not fill groups of {queries} queries as {order.path} has them"
            more = ", or give kv_heads" if FAMILIES[order.teacher.family].grouped_queries else ""
            yield order.problem("heads", f"{text}; {multiples(heads, queries)} would do{more}")
    elif heads % kv_heads:
        yield order.problem("kv_heads", f"{kv_heads} does not divide heads {heads}; {divisors(heads)} would do")
    elif heads // kv_heads > queries:
        text = f"{kv_heads} makes groups of {heads // kv_heads} queries, but those of {order.path} have {queries}"
        least = -(-heads // queries)
        would = spans(n for n in range(least, derive.kv_heads(order.teacher) + 1) if heads % n == 0)
        yield order.problem("kv_heads", f"{text}; {would} would do")


def _the_family_holds_the_width(order: Order) -> Iterator[str]:
    """Some families have heads of hidden / heads alone; transformers loads others only where heads divide hidden."""
    wanted, teacher, (heads, _) = order.wanted, order.teacher, _attention(order)
    if wanted.sparsity is not None or wanted.parameters is not None:
        return
    hidden, width, traits = wanted.hidden or teacher.hidden, derive.head_dim(teacher), FAMILIES[teacher.family]
    if not traits.free_head_dim and hidden != heads * width:
        text = f"{hidden} is not heads {heads} times their width {width}, as it is in {teacher.family}"
        yield order.problem("hidden", f"{text}; {heads * width} would do")
    elif traits.heads_divide_hidden and hidden % heads:
        text = f"{hidden} is not divisible by heads {heads}, and transformers loads no {teacher.family} like that"
        yield order.problem("hidden", f"{text}; {multiples(hidden, heads)} would do")


_CHECKS: tuple[Callable[[Order], Iterator[str]], ...] = (
    _one_way_of_saying_it,
    _the_student_lies_within_the_teacher,
    _groups_hold_as_many_queries,
    _the_family_holds_the_width,
)
