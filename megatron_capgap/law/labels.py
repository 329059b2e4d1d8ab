"""Whether to distil at all: training on labels alone for the same operations.

A token costs 6 operations a student parameter, and 2 a teacher parameter more where a teacher reads it as well. For the
operations of distilling D tokens, labels alone train on D (1 + T / 3S) tokens. What distilling gains at D tokens comes
from pairs of runs with the same start (`causes`); what the further tokens gain, from runs on labels alone over several
numbers of tokens,

    loss = level[student, seed, start] + (a + b log S) x + c x^2,    x = log(tokens)

by least squares, b where there are several students and c where there are three numbers of tokens. Both are uncertain;
the answer is their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_capgap.law.causes import FEW_PAIRS, SHARED, begun, counterparts, gained
from megatron_capgap.law.cells import Array
from megatron_capgap.law.formatting import short
from megatron_capgap.law.gaussian_process import root_of
from megatron_capgap.law.levels import losses
from megatron_capgap.law.records import Record
from megatron_capgap.law.verdict import DRAWS, quantiles

FAR_TOKENS = 4.0
"""So many times beyond the tokens of the runs on labels alone nothing is said: losses do not go on falling so."""
FREEDOM = 2
"""Degrees of freedom that the further tokens' gain needs."""


@dataclass(frozen=True)
class Against:
    """Distilling with one teacher against labels alone for the same operations."""

    times: float
    """So many times the tokens can labels alone be trained on."""
    gain: tuple[float, float, float]
    """How much lower distilling ends, nats a token: the lower end of the interval, median, upper end."""
    probability: float
    """That distilling ends lower."""


Further = Callable[[float, float, float], Array]
"""From student, tokens and more tokens to draws of what these gain on labels alone, nats a token `[DRAWS]`."""


def against(
    taught: Sequence[Record],
    everything: Sequence[Record],
    count: str,
    student: float,
    teachers: Mapping[str, float],
    tokens: float | None = None,
) -> dict[str, Against] | str:
    """The comparison for each teacher by name, or why there is none.

    Args:
        taught: the runs that are studied, under one set of conditions.
        everything: all records, among which those on labels alone are.
        count: how parameters are counted, one of `records.COUNTS`.
        student: parameters.
        teachers: their parameters, within what the runs tell of.
        tokens: that the student is to be distilled on; as the runs were where None.
    """
    wanted = [name for name in SHARED if name != "tokens"]
    conditions = [getattr(taught[0], name) for name in wanted]
    alone = [each for each in everything if not each.taught and [getattr(each, name) for name in wanted] == conditions]
    if not taught[0].taught or not alone:
        return "there are no runs on labels alone from the starts of taught ones"
    known = sorted({each.tokens for each in alone})
    if len(known) == 1:
        return f"all {len(alone)} runs on labels alone have the same tokens, {short(known[0])}"
    pairs = counterparts(taught, everything)
    if len(pairs) < FEW_PAIRS:
        return f"{len(pairs)} taught runs have one on labels alone with the same start, seed and tokens"
    random = np.random.default_rng(0)
    further = _further(alone, count, random)
    if further is None:
        return f"{len(alone)} runs on labels alone do not tell what further tokens gain; none has a start of others"
    process, on = gained(pairs, count, random), tokens or float(taught[0].tokens)
    times = {name: 1 + size / (3 * student) for name, size in teachers.items()}
    most = max(times.values()) * on
    if most > FAR_TOKENS * known[-1] or on < known[0] / FAR_TOKENS:
        return (
            f"for the same FLOPs labels alone train on up to {short(most)} tokens, and the runs on labels alone had "
            f"{short(known[0])} to {short(known[-1])}"
        )
    given = losses(process, student, np.log(np.array(list(teachers.values())) / student), DRAWS)
    found = {}
    for number, (name, factor) in enumerate(times.items()):
        gains = given[:, number] - further(student, on, factor * on)
        low, middle, high = quantiles(gains).tolist()
        found[name] = Against(float(factor), (low, middle, high), float(np.mean(gains > 0)))
    return found


def _further(alone: Sequence[Record], count: str, random: np.random.Generator) -> Further | None:
    """The fit; None where too few runs with the same start have different tokens. Terms that the runs cannot tell
    beside FREEDOM degrees of freedom are left out, the last ones first."""
    starts = [begun(each) for each in alone]
    groups = {key: number for number, key in enumerate(dict.fromkeys(starts))}
    levels = np.eye(len(groups))[[groups[key] for key in starts]]
    y = np.array([each.valid_loss for each in alone])
    middle = np.log([each.sizes(count)[0] for each in alone]).mean()

    def terms(size: Array, tokens: Array) -> Array:
        x = np.log(tokens / alone[0].tokens)
        return np.stack([x, x * (size - middle), x**2], axis=1)

    every = terms(np.log([each.sizes(count)[0] for each in alone]), np.array([each.tokens for each in alone]))
    for used in ([0, 1, 2], [0, 1], [0]):
        design = np.concatenate([levels, every[:, used]], axis=1)
        freedom = len(y) - design.shape[1]
        if freedom >= FREEDOM and np.linalg.matrix_rank(design) == design.shape[1]:
            break
    else:
        return None
    inverse = np.linalg.pinv(design)
    found = inverse @ y
    variance = float(np.sum((y - design @ found) ** 2)) / freedom
    last = slice(-len(used), None)
    root = root_of((inverse @ inverse.T)[last, last])
    size = np.sqrt(variance * freedom / random.chisquare(freedom, DRAWS))
    drawn = found[last] + size[:, None] * (random.standard_normal((DRAWS, len(used))) @ root.T)

    def gain(student: float, tokens: float, more: float) -> Array:
        before, after = terms(np.log([student, student]), np.array([tokens, more]))[:, used]
        return drawn @ (before - after)

    return gain
