"""The student's shape, from the section `prune` and the teacher's shape. No torch.

A Megatron model has one width for all its layers, so counts are uniform over layers, as in the paper's conversion of
LLaMA2-7B. With `prune.per_layer` they differ, as in its pilot: this module fixes the totals over all layers; the scores
then decide the number that each layer keeps, and the width that all layers store.
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
# Largest accepted relative difference between a shape's parameters and the requested number.
_FARTHEST = 0.25
_SHARES = 2000  # steps of the share to which the widths are reduced


UNDECIDED = ("heads", "kv_heads", "head_dim", "ffn")
"""Fields of the student's shape that the scores decide if it has a budget."""


@dataclass(frozen=True)
class Budget:
    """Totals over all layers, if each layer may keep a different number of parts.

    The layout must divide the stored width, so that is rounded. The number kept in a layer is rounded only for neurons,
    to units, because there are many of them. Key/value heads are few: with rounding, every layer would keep all of 8
    heads under tensor 8.
    """

    groups: int
    """Key/value heads, each with its queries, in all layers together; a layer keeps at least one."""
    widths: tuple[int, ...]
    """Numbers of key/value heads that layers can store: divided by the layout, supported by the family; ascending."""
    neurons: int
    """Neurons in all layers together, a multiple of `unit`."""
    unit: int
    """A layer keeps a multiple of this number of neurons, at least one unit; the layout divides it."""
    most: int
    """Maximum number of neurons that a layer keeps."""
    tensor: int
    """Tensor-parallel size of the layout."""

    def stored_groups(self, count: int) -> int:
        """The smallest number of key/value heads that can be stored in a layer that keeps `count`."""
        return next(width for width in self.widths if width >= count)


@dataclass(frozen=True)
class StudentTarget:
    """The student as known before the scores."""

    shape: ModelShape
    """The student's shape; with a budget the smallest possible one, in which all layers keep equally many parts."""
    budget: Budget | None = None
    """None if all layers keep equally many parts."""

    @property
    def kept(self) -> int:
        """Number of kept parameters without embeddings; further stored parameters are zero."""
        if self.budget is None:
            return size.non_embedding_parameters(self.shape)
        return size.kept_parameters(self.shape, self.budget.groups, self.budget.neurons)


@dataclass(frozen=True)
class PruneSpec:
    """The configuration of a pruning, and the teacher's shape."""

    loaded: LoadedConfig
    teacher: ModelShape
    path: str
    """The teacher's checkpoint, as named in messages."""

    @property
    def wanted(self) -> PruneConfig:
        """The section `prune`."""
        assert self.loaded.config.prune is not None, "guaranteed by config.loader"
        return self.loaded.config.prune

    @property
    def tensor(self) -> int:
        """Tensor-parallel size of the student's layout."""
        return self.loaded.config.student.layout.tensor

    @property
    def queries(self) -> int:
        """The teacher's queries per group."""
        return self.teacher.heads // derived.kv_heads(self.teacher)

    def problem(self, key: str, text: str) -> str:
        """A complete message about `prune.key`."""
        return f"{self.loaded.location(f'prune.{key}' if key else 'prune')}: {text}"


def student_target(loaded: LoadedConfig, teacher: ModelShape) -> StudentTarget:
    """The student's shape, and with prune.per_layer its budget.

    Args:
        loaded: configuration of the stage prune.
        teacher: the shape of teacher.checkpoint.

    Raises:
        ConfigError: with one line per problem.
    """
    assert loaded.config.teacher is not None, "guaranteed by config.loader"
    order = PruneSpec(loaded, teacher, loaded.config.teacher.checkpoint)
    # Each check assumes that the previous ones found no problem.
    for row in _CHECKS:
        if problems := list(row(order)):
            raise ConfigError(problems)
    found = _chosen(order)
    if problems := list(_check_nontrivial(order, found)):
        raise ConfigError(problems)
    return found


def _check_nontrivial(order: PruneSpec, found: StudentTarget) -> Iterator[str]:
    """The student must be smaller than the teacher, and with per_layer it must be possible for layers to differ."""
    budget, layers = found.budget, found.shape.layers
    if budget is not None:
        if (budget.groups, budget.neurons) == (layers * budget.widths[-1], layers * budget.most):
            text = "true, but every layer keeps all heads and neurons that it can store, so layers cannot differ"
            yield order.problem("per_layer", f"{text}; use fewer heads or ffn or a larger sparsity, or remove the key")
    elif _numbers(found.shape) == _numbers(order.teacher):
        text = f"leaves {order.path} unchanged; use smaller layers, hidden, heads or ffn, or a larger sparsity"
        yield order.problem("", text)


def _chosen(order: PruneSpec) -> StudentTarget:
    wanted, teacher = order.wanted, order.teacher
    if wanted.sparsity is not None:
        # A weight connects two of hidden, heads and ffn, and is kept if both of its ends are kept.
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
    """Number of heads and of key/value heads that the section asks for."""
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
        # If only dead channels are removed, a norm's mean square grows by teacher.hidden / hidden; so must its epsilon.
        norm_epsilon=teacher.norm_epsilon * (teacher.hidden / hidden),
    )


def _by_sparsity(order: PruneSpec, share: float) -> StudentTarget:
    """Hidden, heads and ffn reduced to a share of the teacher's, in units that the layout divides."""
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
    """Hidden reduced to a share of the teacher's; heads and neurons such that share * share of the weights are kept,
    whatever hidden is rounded to."""
    wanted, teacher, tensor, queries = order.wanted, order.teacher, order.tensor, order.queries
    traits, groups = ARCHITECTURES[teacher.family], derived.kv_heads(teacher)
    if traits.free_head_dim:
        # A layer may keep all of its heads, and transformers requires that they divide hidden.
        unit = math.lcm(wanted.multiple, teacher.heads) if traits.heads_divide_hidden else wanted.multiple
        hidden = _nearest(share * teacher.hidden, unit, teacher.hidden)
    else:
        # Hidden equals the stored heads' total width; rounding it up lets some layers keep more heads than others.
        hidden = math.ceil(share * groups / tensor) * tensor * queries * derived.head_dim(teacher)
    kept = min(1.0, share * share * teacher.hidden / hidden)
    unit = math.lcm(wanted.multiple, tensor)
    return _over_layers(order, hidden, queries, kept * groups, kept * teacher.ffn, min(unit, teacher.ffn))


def _over_layers(
    order: PruneSpec, hidden: int, queries: int, groups: float, neurons: float, unit: int
) -> StudentTarget:
    """The target if each layer may keep a different number of parts.

    Args:
        order: the configuration and the teacher's shape.
        hidden: number of kept channels.
        queries: number of kept queries per key/value head.
        groups, neurons: mean number kept per layer; the totals are the nearest whole numbers of units.
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
    """Numbers of key/value heads that the layout divides and the family supports with this hidden, ascending."""
    traits, width = ARCHITECTURES[order.teacher.family], derived.head_dim(order.teacher)
    for groups in range(order.tensor, derived.kv_heads(order.teacher) + 1, order.tensor):
        heads = groups * queries
        if (traits.free_head_dim or heads * width == hidden) and not (traits.heads_divide_hidden and hidden % heads):
            yield groups


def _no_width(order: PruneSpec, hidden: int, queries: int, groups: int) -> str:
    """The message that no layer can store `groups` key/value heads, the mean number that is kept."""
    family, width = order.teacher.family, derived.head_dim(order.teacher)
    stored = -(-groups // order.tensor) * order.tensor * queries
    if ARCHITECTURES[family].free_head_dim:
        would = multiples(hidden, derived.kv_heads(order.teacher) * queries)
        text = f"{hidden} is not divisible by any number of heads, {groups * queries} or more, that layers could store"
    else:
        would = str(stored * width)
        text = f"{hidden} is no whole number of heads {width} wide, {groups * queries} or more, that layers could store"
    return order.problem("hidden", f"{text}, as {family} requires; valid values: {would}")


def _nearest(number: float, unit: int, most: int) -> int:
    """The multiple of `unit` nearest to a number, at least one unit; `most` itself if no multiple is below it."""
    return min(max(1, round(number / unit)) * unit, most // unit * unit or most)


def _of_parameters(order: PruneSpec, parameters: int) -> StudentTarget:
    """The shape with the nearest number of parameters without embeddings, of all that reduce widths by one share."""
    targets = {_by_sparsity(order, share / _SHARES): None for share in range(1, _SHARES + 1)}

    def distance(found: StudentTarget) -> int:
        return abs(found.kept - parameters)

    best = min(targets, key=distance)
    if distance(best) > _FARTHEST * parameters:
        text = f"{parameters} is not near any shape; use {best.kept}, a smaller prune.multiple, or fewer layers"
        raise ConfigError([order.problem("parameters", text)])
    return best


def _check_single_size_option(order: PruneSpec) -> Iterator[str]:
    """Only one of widths, sparsity and parameters may be given; layers may be combined with each."""
    wanted, config = order.wanted, order.loaded.config
    widths = [name for name in _WIDTHS if getattr(wanted, name) is not None]
    totals = [name for name in ("sparsity", "parameters") if getattr(wanted, name) is not None]
    if len(totals) == 2:
        text = f"{wanted.parameters} given in addition to prune.sparsity {wanted.sparsity}; give only one of them"
        yield order.problem("parameters", text)
    for name in widths if totals else ():
        text = f"{getattr(wanted, name)} given, but prune.{totals[0]} determines the widths; give only one of them"
        yield order.problem(name, text)
    if not widths and not totals and wanted.layers is None:
        text = "does not give the student's size; give layers, hidden, heads and ffn, or sparsity, or parameters"
        yield order.problem("", text)
    if config.teacher is not None and config.teacher.layout is not None:
        place = order.loaded.location("teacher.layout")
        yield f"{place}: prune runs the teacher in student.layout; remove the key"


def _check_within_teacher(order: PruneSpec) -> Iterator[str]:
    """No size may exceed the teacher's."""
    for name in ("layers", *_WIDTHS):
        given = getattr(order.wanted, name)
        most = derived.kv_heads(order.teacher) if name == "kv_heads" else getattr(order.teacher, name)
        if given is not None and given > most:
            text = f"{given} is larger than {name} {most} of {order.path}; valid values: {spans(range(1, most + 1))}"
            yield order.problem(name, text)
    parameters, most = order.wanted.parameters, size.non_embedding_parameters(order.teacher)
    if parameters is not None and parameters >= most:
        text = f"{parameters} is not below the {most} of {order.path} without embeddings; use e.g. {round(most / 2.5)}"
        yield order.problem("parameters", text)


def _check_queries_per_group(order: PruneSpec) -> Iterator[str]:
    """Queries must keep the key and value that they were trained with."""
    wanted, queries, (heads, kv_heads) = order.wanted, order.queries, _attention(order)
    if wanted.kv_heads is None:
        if heads % queries:
            text = f"{heads} heads do not fill groups of {queries} queries, which {order.path} has"
            more = ", or give kv_heads" if ARCHITECTURES[order.teacher.family].grouped_queries else ""
            yield order.problem("heads", f"{text}; nearest valid values: {multiples(heads, queries)}{more}")
    elif heads % kv_heads:
        yield order.problem("kv_heads", f"{kv_heads} does not divide heads {heads}; valid values: {divisors(heads)}")
    elif heads // kv_heads > queries:
        text = f"{kv_heads} makes groups of {heads // kv_heads} queries, but those of {order.path} have {queries}"
        least = -(-heads // queries)
        would = spans(n for n in range(least, derived.kv_heads(order.teacher) + 1) if heads % n == 0)
        yield order.problem("kv_heads", f"{text}; valid values: {would}")


def _check_width_allowed(order: PruneSpec) -> Iterator[str]:
    """Some families require a head width of hidden / heads; others are loaded by transformers only if heads divide
    hidden."""
    wanted, teacher, (heads, _) = order.wanted, order.teacher, _attention(order)
    if wanted.sparsity is not None or wanted.parameters is not None or wanted.per_layer:
        return  # with per_layer heads are a mean; `_over_layers` finds a number that layers can store
    hidden, width, traits = wanted.hidden or teacher.hidden, derived.head_dim(teacher), ARCHITECTURES[teacher.family]
    if not traits.free_head_dim and hidden != heads * width:
        text = f"{hidden} is not heads {heads} times their width {width}, as {teacher.family} requires"
        yield order.problem("hidden", f"{text}; valid values: {heads * width}")
    elif traits.heads_divide_hidden and hidden % heads:
        text = f"{hidden} is not divisible by heads {heads}, and transformers cannot load such a {teacher.family}"
        yield order.problem("hidden", f"{text}; nearest valid values: {multiples(hidden, heads)}")


def _check_heads_divide_over_tensor(order: PruneSpec) -> Iterator[str]:
    """With per_layer, the layout must divide the teacher's heads; otherwise the general layout check covers the
    student's."""
    groups = derived.kv_heads(order.teacher)
    if order.wanted.per_layer and groups % order.tensor:
        text = f"{order.tensor} does not divide kv_heads {groups} of {order.path}; valid values: {divisors(groups)}"
        yield f"{order.loaded.location('student.layout.tensor')}: {text}"


_CHECKS: tuple[Callable[[PruneSpec], Iterator[str]], ...] = (
    _check_single_size_option,
    _check_within_teacher,
    _check_queries_per_group,
    _check_width_allowed,
    _check_heads_divide_over_tensor,
)
