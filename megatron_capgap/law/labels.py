"""Compares distillation with training on labels alone for the same FLOPs.

A token costs 6 FLOPs per student parameter, plus 2 per teacher parameter with a teacher. For the FLOPs of distilling
D tokens, training on labels alone processes D (1 + T / 3S) tokens. The gain of distillation at D tokens comes from
pairs of runs with the same start (`causes`). The gain of the additional tokens comes from runs on labels alone with
several numbers of tokens,

    loss = level[student, seed, start] + (a + b log S) x + c x^2,    x = log(tokens)

by least squares, with b if there are several students and c if there are three numbers of tokens. Both gains are
uncertain; the result is their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_capgap.law.causes import FEW_PAIRS, SHARED, counterparts, gained, start_key
from megatron_capgap.law.cells import Array
from megatron_capgap.law.formatting import short
from megatron_capgap.law.gaussian_process import root_of
from megatron_capgap.law.levels import losses
from megatron_capgap.law.records import Record
from megatron_capgap.law.verdict import DRAWS, quantiles

FAR_TOKENS = 4.0
"""Maximum factor beyond the tokens of the runs on labels alone: losses cannot be extrapolated further."""
FREEDOM = 2
"""Minimum residual degrees of freedom of the fit for additional tokens."""


@dataclass(frozen=True)
class Against:
    """Distillation from one teacher compared with labels alone for the same FLOPs."""

    times: float
    """Ratio of the tokens on labels alone to the distillation tokens."""
    gain: tuple[float, float, float]
    """Loss on labels alone minus the loss of distillation, nats per token: lower end of the interval, median, upper
    end."""
    probability: float
    """Probability that distillation ends with the lower loss."""


Further = Callable[[float, float, float], Array]
"""(student, tokens, more tokens) -> draws of the gain of more tokens on labels alone, nats per token `[DRAWS]`."""


def against(
    taught: Sequence[Record],
    everything: Sequence[Record],
    count: str,
    student: float,
    teachers: Mapping[str, float],
    tokens: float | None = None,
) -> dict[str, Against] | str:
    """The comparison for each teacher by name, or the reason why there is none.

    Args:
        taught: the distillation runs, under one set of conditions.
        everything: all records, including those on labels alone.
        count: how parameters are counted, one of `records.COUNTS`.
        student: parameters.
        teachers: their parameters, within the range covered by the runs.
        tokens: distillation tokens; None takes those of the runs.
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
    distilled = losses(process, student, np.log(np.array(list(teachers.values())) / student), DRAWS)
    found = {}
    for number, (name, factor) in enumerate(times.items()):
        gains = distilled[:, number] - further(student, on, factor * on)
        low, middle, high = quantiles(gains).tolist()
        found[name] = Against(float(factor), (low, middle, high), float(np.mean(gains > 0)))
    return found


def _further(alone: Sequence[Record], count: str, random: np.random.Generator) -> Further | None:
    """The fit; None if too few runs with the same start have different tokens. Terms are dropped, the last ones first,
    until FREEDOM degrees of freedom are left."""
    starts = [start_key(each) for each in alone]
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
