"""The shape of the student that the section `prune` asks for, from the teacher's shape alone. No torch.

A Megatron model has one width for all its layers, so counts are uniform over layers, as in the paper's conversion of
LLaMA2-7B. With `prune.per_layer` they differ, as in its pilot: what all layers keep together is known here, and what
each of them keeps, and with it the width that all of them store, when the scores are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.config.prune import PruneConfig
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.config.validation.context import divisors, multiples, spans
from megatron_capgap.models import size

_WIDTHS = ("hidden", "heads", "kv_heads", "ffn")
# Beyond this a shape is no answer to the number of parameters that was asked for.
_FARTHEST = 0.25
_SHARES = 2000  # steps of the share by which the widths are cut


UNDECIDED = ("heads", "kv_heads", "head_dim", "ffn")
"""Numbers of the student's shape that wait for the scores where it has a budget."""


@dataclass(frozen=True)
class Budget:
    """What layers keep together where each may keep a number of its own.

    What a layout must divide is the width that they store, and that is rounded. What a layer keeps of it is rounded
    where that costs nothing: neurons, which are many, to units. Key/value heads are few: were they rounded too, of 8
    under tensor 8 every layer would keep all.
    """

    groups: int
    """Key/value heads, each with its queries, of all layers; a layer keeps one at least."""
    widths: tuple[int, ...]
    """Numbers of key/value heads that layers can store, for the layout divides and the family holds them; ascending."""
    neurons: int
    """Neurons of all layers, a multiple of `unit`."""
    unit: int
    """A layer keeps a multiple of so many neurons, and one at least; the layout divides it."""
    most: int
    """Neurons that a layer keeps at most."""
    tensor: int
    """Tensor-parallel size of the layout."""

    def stored_groups(self, count: int) -> int:
        """The least number of key/value heads that a layer can store which keeps so many."""
        return next(width for width in self.widths if width >= count)


@dataclass(frozen=True)
class StudentTarget:
    """The student as far as it is known before the scores."""

    shape: ModelShape
    """The student's; with a budget the least that it can come to, were all layers to keep as many heads and neurons."""
    budget: Budget | None = None
    """None where all layers keep as many."""

    @property
    def kept(self) -> int:
        """Parameters without embeddings that stay; what is stored beyond them is zero."""
        if self.budget is None:
            return size.non_embedding_parameters(self.shape)
        return size.kept_parameters(self.shape, self.budget.groups, self.budget.neurons)


@dataclass(frozen=True)
class PruneSpec:
    """What is to be cut out of what."""

    loaded: LoadedConfig
    teacher: ModelShape
    path: str
    """The teacher's checkpoint, as messages name it."""

    @property
    def wanted(self) -> PruneConfig:
        """The section."""
        assert self.loaded.config.prune is not None, "load refuses a prune configuration without the section"
        return self.loaded.config.prune

    @property
    def tensor(self) -> int:
        """Tensor-parallel size of the student's layout."""
        return self.loaded.config.student.layout.tensor

    @property
    def queries(self) -> int:
        """The teacher's queries to a group."""
        return self.teacher.heads // derived.kv_heads(self.teacher)

    def problem(self, key: str, text: str) -> str:
        """One finished sentence about `prune.key`."""
        return f"{self.loaded.location(f'prune.{key}' if key else 'prune')}: {text}"


def student_target(loaded: LoadedConfig, teacher: ModelShape) -> StudentTarget:
    """What the student is to be.

    Args:
        loaded: of the stage prune.
        teacher: the shape found in teacher.checkpoint.

    Raises:
        ConfigError: with one line for every problem.
    """
    assert loaded.config.teacher is not None, "load refuses a prune configuration without a teacher"
    order = PruneSpec(loaded, teacher, loaded.config.teacher.checkpoint)
    # Each row supposes that the ones before it found nothing.
    for row in _CHECKS:
        if problems := list(row(order)):
            raise ConfigError(problems)
    found = _chosen(order)
    if problems := list(_check_nontrivial(order, found)):
        raise ConfigError(problems)
    return found


def _check_nontrivial(order: PruneSpec, found: StudentTarget) -> Iterator[str]:
    """The student is not the teacher, and where layers may differ they can."""
    budget, layers = found.budget, found.shape.layers
    if budget is not None:
        if (budget.groups, budget.neurons) == (layers * budget.widths[-1], layers * budget.most):
            text = "true, but every layer keeps all heads and neurons that it can store, so that none can differ"
            yield order.problem("per_layer", f"{text}; give fewer heads or ffn or a larger sparsity, or remove the key")
    elif _numbers(found.shape) == _numbers(order.teacher):
        text = f"leaves {order.path} as it is; a smaller layers, hidden, heads or ffn would do, or a larger sparsity"
        yield order.problem("", text)


def _chosen(order: PruneSpec) -> StudentTarget:
    wanted, teacher = order.wanted, order.teacher
    if wanted.sparsity is not None:
        # A weight lies between two of hidden, heads and ffn: it stays where both of its ends stay.
        return _by_sparsity(order, math.sqrt(1.0 - wanted.sparsity))
    if wanted.parameters is not None:
        return _of_parameters(order, wanted.parameters)
    hidden, (heads, groups), ffn = wanted.hidden or teacher.hidden, _attention(order), wanted.ffn or teacher.ffn
    if not wanted.per_layer:
        return StudentTarget(_shape(order, hidden, heads, groups, ffn))
    return _over_layers(order, hidden, heads // groups, groups, ffn, order.tensor)


def _numbers(shape: ModelShape) -> tuple[int, ...]:
    return shape.layers, shape.hidden, shape.heads, derived.kv_heads(shape), shape.ffn


def _attention(order: PruneSpec) -> tuple[int, int]:
    """Heads and groups that the numbers come to."""
    wanted, teacher = order.wanted, order.teacher
    if wanted.heads is None and wanted.kv_heads is None:
        return teacher.heads, derived.kv_heads(teacher)
    heads = wanted.heads or (wanted.kv_heads or 0) * order.queries
    return heads, wanted.kv_heads or heads // order.queries


def _shape(order: PruneSpec, hidden: int, heads: int, kv_heads: int, ffn: int) -> ModelShape:
    teacher, width = order.teacher, derived.head_dim(order.teacher)
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


def _by_sparsity(order: PruneSpec, share: float) -> StudentTarget:
    """Hidden, heads and ffn cut to a share of the teacher's, in units that the layout divides."""
    wanted, teacher, tensor = order.wanted, order.teacher, order.tensor
    traits, width = ARCHITECTURES[teacher.family], derived.head_dim(teacher)
    if wanted.per_layer:
        return _by_sparsity_over_layers(order, share)
    groups = _nearest(share * derived.kv_heads(teacher), tensor, derived.kv_heads(teacher))
    heads = groups * order.queries
    unit = math.lcm(wanted.multiple, heads) if traits.heads_divide_hidden else wanted.multiple
    hidden = _nearest(share * teacher.hidden, unit, teacher.hidden) if traits.free_head_dim else heads * width
    ffn = _nearest(share * teacher.ffn, math.lcm(wanted.multiple, tensor), teacher.ffn)
    return StudentTarget(_shape(order, hidden, heads, groups, ffn))


def _by_sparsity_over_layers(order: PruneSpec, share: float) -> StudentTarget:
    """Hidden cut to a share of the teacher's; heads and neurons to what leaves share * share of the weights, whatever
    hidden was rounded to."""
    wanted, teacher, tensor, queries = order.wanted, order.teacher, order.tensor, order.queries
    traits, groups = ARCHITECTURES[teacher.family], derived.kv_heads(teacher)
    if traits.free_head_dim:
        # A layer may keep all of its heads, and transformers wants them to divide hidden.
        unit = math.lcm(wanted.multiple, teacher.heads) if traits.heads_divide_hidden else wanted.multiple
        hidden = _nearest(share * teacher.hidden, unit, teacher.hidden)
    else:
        # Hidden is as wide as the heads that are stored, so rounding it up lets some layers keep more than others.
        hidden = math.ceil(share * groups / tensor) * tensor * queries * derived.head_dim(teacher)
    kept = min(1.0, share * share * teacher.hidden / hidden)
    unit = math.lcm(wanted.multiple, tensor)
    return _over_layers(order, hidden, queries, kept * groups, kept * teacher.ffn, min(unit, teacher.ffn))


def _over_layers(
    order: PruneSpec, hidden: int, queries: int, groups: float, neurons: float, unit: int
) -> StudentTarget:
    """Layers that keep numbers of their own.

    Args:
        order: what is to be cut out of what.
        hidden: channels that stay.
        queries: that stay of each key/value head.
        groups, neurons: that a layer keeps in the mean; all layers together keep the nearest whole numbers of units.
        unit: of neurons.
    """
    teacher, layers = order.teacher, order.wanted.layers or order.teacher.layers
    widths = tuple(_widths(order, hidden, queries))
    if not widths or widths[-1] < groups:
        raise ConfigError([_no_width(order, hidden, queries, math.ceil(groups))])
    most = teacher.ffn // unit * unit
    units = max(layers, round(layers * neurons / unit))
    budget = Budget(
        groups=min(max(layers, round(layers * groups)), layers * widths[-1]),
        widths=widths,
        neurons=min(units * unit, layers * most),
        unit=unit,
        most=most,
        tensor=order.tensor,
    )
    least = budget.stored_groups(-(-budget.groups // layers))
    ffn = -(-budget.neurons // (layers * unit)) * unit
    return StudentTarget(_shape(order, hidden, least * queries, least, ffn), budget)


def _widths(order: PruneSpec, hidden: int, queries: int) -> Iterator[int]:
    """Numbers of key/value heads that the layout divides and the family holds beside this hidden, ascending."""
    traits, width = ARCHITECTURES[order.teacher.family], derived.head_dim(order.teacher)
    for groups in range(order.tensor, derived.kv_heads(order.teacher) + 1, order.tensor):
        heads = groups * queries
        if (traits.free_head_dim or heads * width == hidden) and not (traits.heads_divide_hidden and hidden % heads):
            yield groups


def _no_width(order: PruneSpec, hidden: int, queries: int, groups: int) -> str:
    """A problem: no layer can store `groups` key/value heads, which is what they keep in the mean."""
    family, width = order.teacher.family, derived.head_dim(order.teacher)
    stored = -(-groups // order.tensor) * order.tensor * queries
    if ARCHITECTURES[family].free_head_dim:
        would = multiples(hidden, derived.kv_heads(order.teacher) * queries)
        text = f"{hidden} is divided by no number of heads, {groups * queries} or more, that layers could store"
    else:
        would = str(stored * width)
        text = f"{hidden} is no whole number of heads {width} wide, {groups * queries} or more, that layers could store"
    return order.problem("hidden", f"{text}, as {family} needs it; {would} would do")


def _nearest(number: float, unit: int, most: int) -> int:
    """The multiple of `unit` nearest to a number, at least one; `most` itself where no multiple fits below it."""
    return min(max(1, round(number / unit)) * unit, most // unit * unit or most)


def _of_parameters(order: PruneSpec, parameters: int) -> StudentTarget:
    """The shape whose parameters without embeddings come nearest, of all that cut the widths by one share."""
    targets = {_by_sparsity(order, share / _SHARES): None for share in range(1, _SHARES + 1)}

    def distance(found: StudentTarget) -> int:
        return abs(found.kept - parameters)

    best = min(targets, key=distance)
    if distance(best) > _FARTHEST * parameters:
        text = f"{parameters} is not near any shape; {best.kept} would do, or a smaller prune.multiple, or fewer layers"
        raise ConfigError([order.problem("parameters", text)])
    return best


def _check_single_size_option(order: PruneSpec) -> Iterator[str]:
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
        place = order.loaded.location("teacher.layout")
        yield f"{place}: prune runs the teacher in student.layout; remove the key"


def _check_within_teacher(order: PruneSpec) -> Iterator[str]:
    """Nothing can be pruned to a larger size."""
    for name in ("layers", *_WIDTHS):
        given = getattr(order.wanted, name)
        most = derived.kv_heads(order.teacher) if name == "kv_heads" else getattr(order.teacher, name)
        if given is not None and given > most:
            text = f"{given} is larger than {name} {most} of {order.path}; {spans(range(1, most + 1))} would do"
            yield order.problem(name, text)
    parameters, most = order.wanted.parameters, size.non_embedding_parameters(order.teacher)
    if parameters is not None and parameters >= most:
        text = f"{parameters} is not below the {most} of {order.path} without embeddings; {round(most / 2.5)} would do"
        yield order.problem("parameters", text)


def _check_queries_per_group(order: PruneSpec) -> Iterator[str]:
    """Queries stay with the key and value that they were trained with."""
    wanted, queries, (heads, kv_heads) = order.wanted, order.queries, _attention(order)
    if wanted.kv_heads is None:
        if heads % queries:
            text = f"{heads} heads do not fill groups of {queries} queries as {order.path} has them"
            more = ", or give kv_heads" if ARCHITECTURES[order.teacher.family].grouped_queries else ""
            yield order.problem("heads", f"{text}; {multiples(heads, queries)} would do{more}")
    elif heads % kv_heads:
        yield order.problem("kv_heads", f"{kv_heads} does not divide heads {heads}; {divisors(heads)} would do")
    elif heads // kv_heads > queries:
        text = f"{kv_heads} makes groups of {heads // kv_heads} queries, but those of {order.path} have {queries}"
        least = -(-heads // queries)
        would = spans(n for n in range(least, derived.kv_heads(order.teacher) + 1) if heads % n == 0)
        yield order.problem("kv_heads", f"{text}; {would} would do")


def _check_width_allowed(order: PruneSpec) -> Iterator[str]:
    """Some families have heads of hidden / heads alone; transformers loads others only where heads divide hidden."""
    wanted, teacher, (heads, _) = order.wanted, order.teacher, _attention(order)
    if wanted.sparsity is not None or wanted.parameters is not None or wanted.per_layer:
        return  # with per_layer heads are a mean; `_over_layers` looks for a number that layers could store
    hidden, width, traits = wanted.hidden or teacher.hidden, derived.head_dim(teacher), ARCHITECTURES[teacher.family]
    if not traits.free_head_dim and hidden != heads * width:
        text = f"{hidden} is not heads {heads} times their width {width}, as it is in {teacher.family}"
        yield order.problem("hidden", f"{text}; {heads * width} would do")
    elif traits.heads_divide_hidden and hidden % heads:
        text = f"{hidden} is not divisible by heads {heads}, and transformers loads no {teacher.family} like that"
        yield order.problem("hidden", f"{text}; {multiples(hidden, heads)} would do")


def _check_heads_divide_over_tensor(order: PruneSpec) -> Iterator[str]:
    """Without per_layer the student's heads are looked at, with everything else that a layout must divide."""
    groups = derived.kv_heads(order.teacher)
    if order.wanted.per_layer and groups % order.tensor:
        text = f"{order.tensor} does not divide kv_heads {groups} of {order.path}; {divisors(groups)} would do"
        yield f"{order.loaded.location('student.layout.tensor')}: {text}"


_CHECKS: tuple[Callable[[PruneSpec], Iterator[str]], ...] = (
    _check_single_size_option,
    _check_within_teacher,
    _check_queries_per_group,
    _check_width_allowed,
    _check_heads_divide_over_tensor,
)
