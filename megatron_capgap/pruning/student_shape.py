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

_SIZE_KEYS = ("hidden", "heads", "kv_heads", "ffn")
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

    kv_heads: int
    """Key/value heads, each with its queries, in all layers together; a layer keeps at least one."""
    storable_kv_heads: tuple[int, ...]
    """Numbers of key/value heads that layers can store: divided by the layout, supported by the family; ascending."""
    neurons: int
    """Neurons in all layers together, a multiple of `unit`."""
    unit: int
    """A layer keeps a multiple of this number of neurons, at least one unit; the layout divides it."""
    max_neurons: int
    """Maximum number of neurons that a layer keeps."""
    tensor: int
    """Tensor-parallel size of the layout."""

    def smallest_storable(self, count: int) -> int:
        """The smallest number of key/value heads that can be stored in a layer that keeps `count`."""
        return next(number for number in self.storable_kv_heads if number >= count)


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
        return size.kept_parameters(self.shape, self.budget.kv_heads, self.budget.neurons)


@dataclass(frozen=True)
class PruneSpec:
    """The configuration of a pruning, and the teacher's shape."""

    loaded: LoadedConfig
    teacher: ModelShape
    path: str
    """The teacher's checkpoint, as named in messages."""

    @property
    def section(self) -> PruneConfig:
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
    spec = PruneSpec(loaded, teacher, loaded.config.teacher.checkpoint or "teacher.model")
    # Each check assumes that the previous ones found no problem.
    for row in _CHECKS:
        if problems := list(row(spec)):
            raise ConfigError(problems)
    found = _chosen(spec)
    if problems := list(_check_nontrivial(spec, found)):
        raise ConfigError(problems)
    return found


def _check_nontrivial(spec: PruneSpec, found: StudentTarget) -> Iterator[str]:
    """The student must be smaller than the teacher, and with per_layer it must be possible for layers to differ."""
    budget, layers = found.budget, found.shape.layers
    if budget is not None:
        if (budget.kv_heads, budget.neurons) == (layers * budget.storable_kv_heads[-1], layers * budget.max_neurons):
            text = "true, but every layer keeps all heads and neurons that it can store, so layers cannot differ"
            yield spec.problem("per_layer", f"{text}; use fewer heads or ffn or a larger sparsity, or remove the key")
    elif _numbers(found.shape) == _numbers(spec.teacher):
        text = f"leaves {spec.path} unchanged; use smaller layers, hidden, heads or ffn, or a larger sparsity"
        yield spec.problem("", text)


def _chosen(spec: PruneSpec) -> StudentTarget:
    section, teacher = spec.section, spec.teacher
    if section.sparsity is not None:
        # A weight connects two of hidden, heads and ffn, and is kept if both of its ends are kept.
        return _by_sparsity(spec, math.sqrt(1.0 - section.sparsity))
    if section.parameters is not None:
        return _of_parameters(spec, section.parameters)
    hidden, (heads, kv_heads), ffn = section.hidden or teacher.hidden, _attention(spec), section.ffn or teacher.ffn
    if not section.per_layer:
        return StudentTarget(_shape(spec, hidden, heads, kv_heads, ffn))
    return _over_layers(spec, hidden, heads // kv_heads, kv_heads, ffn, spec.tensor)


def _numbers(shape: ModelShape) -> tuple[int, ...]:
    return shape.layers, shape.hidden, shape.heads, derived.kv_heads(shape), shape.ffn


def _attention(spec: PruneSpec) -> tuple[int, int]:
    """Number of heads and of key/value heads that the section asks for."""
    section, teacher = spec.section, spec.teacher
    if section.heads is None and section.kv_heads is None:
        return teacher.heads, derived.kv_heads(teacher)
    heads = section.heads or (section.kv_heads or 0) * spec.queries
    return heads, section.kv_heads or heads // spec.queries


def _shape(spec: PruneSpec, hidden: int, heads: int, kv_heads: int, ffn: int) -> ModelShape:
    teacher, head_dim = spec.teacher, derived.head_dim(spec.teacher)
    return replace(
        teacher,
        layers=spec.section.layers or teacher.layers,
        hidden=hidden,
        heads=heads,
        kv_heads=None if teacher.kv_heads is None and kv_heads == heads else kv_heads,
        head_dim=teacher.head_dim if heads * head_dim == hidden else head_dim,
        ffn=ffn,
        # If only dead channels are removed, a norm's mean square grows by teacher.hidden / hidden; so must its epsilon.
        norm_epsilon=teacher.norm_epsilon * (teacher.hidden / hidden),
    )


def _by_sparsity(spec: PruneSpec, share: float) -> StudentTarget:
    """Hidden, heads and ffn reduced to a share of the teacher's, in units that the layout divides."""
    section, teacher, tensor = spec.section, spec.teacher, spec.tensor
    traits, head_dim = ARCHITECTURES[teacher.family], derived.head_dim(teacher)
    if section.per_layer:
        return _by_sparsity_over_layers(spec, share)
    kv_heads = _nearest(share * derived.kv_heads(teacher), tensor, derived.kv_heads(teacher))
    heads = kv_heads * spec.queries
    unit = math.lcm(section.multiple, heads) if traits.heads_divide_hidden else section.multiple
    hidden = _nearest(share * teacher.hidden, unit, teacher.hidden) if traits.free_head_dim else heads * head_dim
    ffn = _nearest(share * teacher.ffn, math.lcm(section.multiple, tensor), teacher.ffn)
    return StudentTarget(_shape(spec, hidden, heads, kv_heads, ffn))


def _by_sparsity_over_layers(spec: PruneSpec, share: float) -> StudentTarget:
    """Hidden reduced to a share of the teacher's; heads and neurons such that share * share of the weights are kept,
    whatever hidden is rounded to."""
    section, teacher, tensor, queries = spec.section, spec.teacher, spec.tensor, spec.queries
    traits, kv_heads = ARCHITECTURES[teacher.family], derived.kv_heads(teacher)
    if traits.free_head_dim:
        # A layer may keep all of its heads, and transformers requires that they divide hidden.
        unit = math.lcm(section.multiple, teacher.heads) if traits.heads_divide_hidden else section.multiple
        hidden = _nearest(share * teacher.hidden, unit, teacher.hidden)
    else:
        # Hidden equals the stored heads' total width; rounding it up lets some layers keep more heads than others.
        hidden = math.ceil(share * kv_heads / tensor) * tensor * queries * derived.head_dim(teacher)
    kept = min(1.0, share * share * teacher.hidden / hidden)
    unit = math.lcm(section.multiple, tensor)
    return _over_layers(spec, hidden, queries, kept * kv_heads, kept * teacher.ffn, min(unit, teacher.ffn))


def _over_layers(
    spec: PruneSpec, hidden: int, queries: int, kv_heads: float, neurons: float, unit: int
) -> StudentTarget:
    """The target if each layer may keep a different number of parts.

    Args:
        spec: the configuration and the teacher's shape.
        hidden: number of kept channels.
        queries: number of kept queries per key/value head.
        kv_heads, neurons: mean number kept per layer; the totals are the nearest whole numbers of units.
        unit: of neurons.
    """
    teacher, layers = spec.teacher, spec.section.layers or spec.teacher.layers
    storable = tuple(_storable_kv_heads(spec, hidden, queries))
    if not storable or storable[-1] < kv_heads:
        raise ConfigError([_no_storable_message(spec, hidden, queries, math.ceil(kv_heads))])
    max_neurons = teacher.ffn // unit * unit
    units = max(layers, round(layers * neurons / unit))
    budget = Budget(
        kv_heads=min(max(layers, round(layers * kv_heads)), layers * storable[-1]),
        storable_kv_heads=storable,
        neurons=min(units * unit, layers * max_neurons),
        unit=unit,
        max_neurons=max_neurons,
        tensor=spec.tensor,
    )
    least = budget.smallest_storable(-(-budget.kv_heads // layers))
    ffn = -(-budget.neurons // (layers * unit)) * unit
    return StudentTarget(_shape(spec, hidden, least * queries, least, ffn), budget)


def _storable_kv_heads(spec: PruneSpec, hidden: int, queries: int) -> Iterator[int]:
    """Numbers of key/value heads that the layout divides and the family supports with this hidden, ascending."""
    traits, head_dim = ARCHITECTURES[spec.teacher.family], derived.head_dim(spec.teacher)
    for kv_heads in range(spec.tensor, derived.kv_heads(spec.teacher) + 1, spec.tensor):
        heads = kv_heads * queries
        if (traits.free_head_dim or heads * head_dim == hidden) and not (traits.heads_divide_hidden and hidden % heads):
            yield kv_heads


def _no_storable_message(spec: PruneSpec, hidden: int, queries: int, kv_heads: int) -> str:
    """The message that no layer can store `kv_heads` key/value heads, the mean number that is kept."""
    family, head_dim = spec.teacher.family, derived.head_dim(spec.teacher)
    least, stored = kv_heads * queries, -(-kv_heads // spec.tensor) * spec.tensor * queries
    if ARCHITECTURES[family].free_head_dim:
        would = multiples(hidden, derived.kv_heads(spec.teacher) * queries)
        text = f"{hidden} is not divisible by any number of heads, {least} or more, that layers could store"
    else:
        would = str(stored * head_dim)
        text = f"{hidden} is no whole number of heads {head_dim} wide, {least} or more, that layers could store"
    return spec.problem("hidden", f"{text}, as {family} requires; valid values: {would}")


def _nearest(number: float, unit: int, most: int) -> int:
    """The multiple of `unit` nearest to a number, at least one unit; `most` itself if no multiple is below it."""
    return min(max(1, round(number / unit)) * unit, most // unit * unit or most)


def _of_parameters(spec: PruneSpec, parameters: int) -> StudentTarget:
    """The shape with the nearest number of parameters without embeddings, of all that reduce widths by one share."""
    targets = {_by_sparsity(spec, share / _SHARES): None for share in range(1, _SHARES + 1)}

    def distance(found: StudentTarget) -> int:
        return abs(found.kept - parameters)

    best = min(targets, key=distance)
    if distance(best) > _FARTHEST * parameters:
        text = f"{parameters} is not near any shape; use {best.kept}, a smaller prune.multiple, or fewer layers"
        raise ConfigError([spec.problem("parameters", text)])
    return best


def _check_single_size_option(spec: PruneSpec) -> Iterator[str]:
    """Only one of widths, sparsity and parameters may be given; layers may be combined with each."""
    section, config = spec.section, spec.loaded.config
    sizes = [name for name in _SIZE_KEYS if getattr(section, name) is not None]
    totals = [name for name in ("sparsity", "parameters") if getattr(section, name) is not None]
    if len(totals) == 2:
        text = f"{section.parameters} given in addition to prune.sparsity {section.sparsity}; give only one of them"
        yield spec.problem("parameters", text)
    for name in sizes if totals else ():
        text = f"{getattr(section, name)} given, but prune.{totals[0]} determines the widths; give only one of them"
        yield spec.problem(name, text)
    if not sizes and not totals and section.layers is None:
        text = "does not give the student's size; give layers, hidden, heads and ffn, or sparsity, or parameters"
        yield spec.problem("", text)
    if config.teacher is not None and config.teacher.layout is not None:
        place = spec.loaded.location("teacher.layout")
        yield f"{place}: prune runs the teacher in student.layout; remove the key"


def _check_within_teacher(spec: PruneSpec) -> Iterator[str]:
    """No size may exceed the teacher's."""
    for name in ("layers", *_SIZE_KEYS):
        given = getattr(spec.section, name)
        limit = derived.kv_heads(spec.teacher) if name == "kv_heads" else getattr(spec.teacher, name)
        if given is not None and given > limit:
            text = f"{given} is larger than {name} {limit} of {spec.path}; valid values: {spans(range(1, limit + 1))}"
            yield spec.problem(name, text)
    parameters, limit = spec.section.parameters, size.non_embedding_parameters(spec.teacher)
    if parameters is not None and parameters >= limit:
        text = f"{parameters} is not below the {limit} of {spec.path} without embeddings; use e.g. {round(limit / 2.5)}"
        yield spec.problem("parameters", text)


def _check_queries_per_group(spec: PruneSpec) -> Iterator[str]:
    """Queries must keep the key and value that they were trained with."""
    section, queries, (heads, kv_heads) = spec.section, spec.queries, _attention(spec)
    if section.kv_heads is None:
        if heads % queries:
            text = f"{heads} heads do not fill groups of {queries} queries, which {spec.path} has"
            more = ", or give kv_heads" if ARCHITECTURES[spec.teacher.family].grouped_queries else ""
            yield spec.problem("heads", f"{text}; nearest valid values: {multiples(heads, queries)}{more}")
    elif heads % kv_heads:
        yield spec.problem("kv_heads", f"{kv_heads} does not divide heads {heads}; valid values: {divisors(heads)}")
    elif heads // kv_heads > queries:
        text = f"{kv_heads} makes groups of {heads // kv_heads} queries, but those of {spec.path} have {queries}"
        least = -(-heads // queries)
        would = spans(n for n in range(least, derived.kv_heads(spec.teacher) + 1) if heads % n == 0)
        yield spec.problem("kv_heads", f"{text}; valid values: {would}")


def _check_width_allowed(spec: PruneSpec) -> Iterator[str]:
    """Some families require a head width of hidden / heads; others are loaded by transformers only if heads divide
    hidden."""
    section, teacher, (heads, _) = spec.section, spec.teacher, _attention(spec)
    if section.sparsity is not None or section.parameters is not None or section.per_layer:
        return  # with per_layer heads are a mean; `_over_layers` finds a number that layers can store
    hidden, head_dim, traits = (
        section.hidden or teacher.hidden,
        derived.head_dim(teacher),
        ARCHITECTURES[teacher.family],
    )
    if not traits.free_head_dim and hidden != heads * head_dim:
        text = f"{hidden} is not heads {heads} times their width {head_dim}, as {teacher.family} requires"
        yield spec.problem("hidden", f"{text}; valid values: {heads * head_dim}")
    elif traits.heads_divide_hidden and hidden % heads:
        text = f"{hidden} is not divisible by heads {heads}, and transformers cannot load such a {teacher.family}"
        yield spec.problem("hidden", f"{text}; nearest valid values: {multiples(hidden, heads)}")


def _check_heads_divide_over_tensor(spec: PruneSpec) -> Iterator[str]:
    """With per_layer, the layout must divide the teacher's heads; otherwise the general layout check covers the
    student's."""
    kv_heads = derived.kv_heads(spec.teacher)
    if spec.section.per_layer and kv_heads % spec.tensor:
        text = f"{spec.tensor} does not divide kv_heads {kv_heads} of {spec.path}; valid values: {divisors(kv_heads)}"
        yield f"{spec.loaded.location('student.layout.tensor')}: {text}"


_CHECKS: tuple[Callable[[PruneSpec], Iterator[str]], ...] = (
    _check_single_size_option,
    _check_within_teacher,
    _check_queries_per_group,
    _check_width_allowed,
    _check_heads_divide_over_tensor,
)
