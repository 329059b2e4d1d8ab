"""The teacher for a student: the least expected regret among those that can be had, and when not to believe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_capgap.law import cost
from megatron_capgap.law.cells import SAME_SIZE
from megatron_capgap.law.formatting import short
from megatron_capgap.law.gaussian_process import Process
from megatron_capgap.law.labels import Against, against
from megatron_capgap.law.levels import losses
from megatron_capgap.law.records import Record
from megatron_capgap.law.verdict import DRAWS, minima, quantiles, span

FAR = 1.25
"""A student beyond those of the data by more than this factor is warned of."""
REFUSED = 4.0
"""Beyond this factor the data say nothing."""
SMALL_STUDENT = 0.1
"""A student below this share of its teacher learns less from it than from a smaller one in most published sweeps."""
PRUNING = 0.8
"""Share of the teacher's weights from which on pruning is known to lose what training does not bring back."""


@dataclass(frozen=True)
class Candidate:
    """A teacher that can be had."""

    name: str
    teacher: float
    """Parameters."""
    regret: float
    """Expected loss above that of the best teacher within `Advice.within`, in the catalogue or not, nats a token."""
    interval: tuple[float, float]
    """LEVEL interval of the regret."""
    probability: float
    """Of being the best candidate."""
    flops: float | None
    """Operations of distilling with it, where the tokens are known."""
    losses: tuple[float, float, float]
    """The student's loss, nats a token, on as many tokens as the data: the lower end of the interval, median, upper
    end."""
    against: Against | None = None
    """Labels alone for the same operations; None where `Advice.labels` says why."""


@dataclass(frozen=True)
class Advice:
    """What the data say about one student."""

    student: float
    beyond: float
    """How many times the student is beyond those of the data; 1 within them."""
    refusal: str | None
    """Why nothing is recommended; then everything below is empty."""
    best: float | None
    """Median of the best teacher within `within`, in the catalogue or not, parameters."""
    interval: tuple[float, float] | None
    within: tuple[float, float] | None
    """The teachers that the data tell something of, parameters; at an end of it the best may lie beyond."""
    candidates: tuple[Candidate, ...]
    """Those within `within`, the least expected regret first."""
    outside: tuple[str, ...]
    """Names of larger teachers that lie outside of it."""
    warnings: tuple[str, ...]
    labels: str | None = "not looked at"
    """Why distilling cannot be compared with labels alone for the same operations; None where it can."""


def advise(
    process: Process, student: float, catalogue: Mapping[str, float], tokens: float | None = None, init: str = ""
) -> Advice:
    """The recommendation for a student.

    Args:
        process: fitted to the runs under the conditions that the student is to be distilled under.
        student: parameters, counted as the data count.
        catalogue: parameters of the teachers that can be had, by name.
        tokens: that the student is to be distilled on, for the price.
        init: where the students of the data began; `pruned` adds what is known of heavy pruning.
    """
    sizes = process.cells.students()
    beyond = float(max(student / sizes[-1], sizes[0] / student, 1.0))
    known = f"{short(sizes[0])} to {short(sizes[-1])}"
    if beyond > REFUSED:
        reason = f"a student of {short(student)} is {_times(beyond)} times outside the students of these runs ({known})"
        return _refused(student, beyond, reason)
    student = next((size for size in sizes if abs(np.log(size / student)) < SAME_SIZE), student)
    ratios = span(process, student)
    if ratios is None:
        reason = f"no teacher of these runs is at a ratio to {short(student)} that was tried"
        return _refused(student, beyond, reason, tuple(catalogue))
    low, high = student * np.exp(ratios[[0, -1]]) * [1 - 1e-9, 1 + 1e-9]
    inside = {name: size for name, size in catalogue.items() if low <= size <= high}
    outside = tuple(name for name, size in catalogue.items() if size > student * (1 + SAME_SIZE) and name not in inside)
    if not inside:
        reason = f"no teacher of the catalogue is between {short(low)} and {short(high)}, the sizes and ratios that "
        return _refused(student, beyond, f"{reason}these runs have tried", outside)
    drawn = process.curves(student, np.append(ratios, np.log(np.array(list(inside.values())) / student)), DRAWS)
    had = drawn[:, len(ratios) :]
    regret = had - drawn.min(axis=1, keepdims=True)
    best = np.bincount(had.argmin(axis=1), minlength=len(inside)) / DRAWS
    ends = quantiles(regret)
    lost = quantiles(losses(process, student, np.log(np.array(list(inside.values())) / student), DRAWS))
    candidates = [
        Candidate(
            name,
            float(size),
            float(regret[:, n].mean()),
            (float(ends[0, n]), float(ends[2, n])),
            float(best[n]),
            cost.distill_flops(student, size, tokens) if tokens else None,
            (float(lost[0, n]), float(lost[1, n]), float(lost[2, n])),
        )
        for n, (name, size) in enumerate(inside.items())
    ]
    candidates.sort(key=lambda each: (each.regret, each.teacher, each.name))
    least, middle, most = (student * np.exp(quantiles(minima(ratios, drawn[:, : len(ratios)])))).tolist()
    warnings = _warnings(student, beyond, known, candidates[0], init)
    within = (float(low), float(high))
    return Advice(student, beyond, None, middle, (least, most), within, tuple(candidates), outside, tuple(warnings))


def beside_labels(
    advice: Advice, taught: Sequence[Record], everything: Sequence[Record], count: str, tokens: float | None = None
) -> Advice:
    """The advice with what labels alone would reach for the same operations, where the records tell.

    Args:
        advice: for a student.
        taught: the runs that it comes from.
        everything: all records, among which those on labels alone are.
        count: how parameters are counted, one of `records.COUNTS`.
        tokens: that the student is to be distilled on; as the runs were where None.
    """
    if advice.refusal is not None:
        return advice
    teachers = {each.name: each.teacher for each in advice.candidates}
    found = against(taught, everything, count, advice.student, teachers, tokens)
    if isinstance(found, str):
        return replace(advice, labels=found)
    told = tuple(replace(each, against=found[each.name]) for each in advice.candidates)
    return replace(advice, candidates=told, labels=None)


def _refused(student: float, beyond: float, reason: str, outside: tuple[str, ...] = ()) -> Advice:
    return Advice(student, beyond, f"nothing here can tell: {reason}", None, None, None, (), outside, ())


def _warnings(student: float, beyond: float, within: str, first: Candidate, init: str) -> list[str]:
    found = []
    if beyond > FAR:
        found.append(
            f"extrapolation: the student of {short(student)} is {_times(beyond)} times outside the students of these "
            f"runs ({within}); the regrets do not know whether the curves change beyond them"
        )
    if student < SMALL_STUDENT * first.teacher:
        found.append(
            f"the student has {100 * student / first.teacher:.1f}% of the parameters of {first.name}; published sweeps "
            f"advise against teachers more than {1 / SMALL_STUDENT:.0f} times as large"
        )
    if init.startswith("pruned") and 1 - student / first.teacher > PRUNING:
        found.append(
            f"pruning {first.name} to {short(student)} removes {100 * (1 - student / first.teacher):.0f}% of its "
            f"weights; above {100 * PRUNING:.0f}% pruned starts are known to lose most of what the teacher knew"
        )
    return found


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if 100 <= factor < 1e6 else f"{factor:.3g}"
