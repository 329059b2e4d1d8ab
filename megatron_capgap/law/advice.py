"""Recommends a teacher for a student: least expected regret among the catalogue, with limits and warnings."""

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
"""Factor beyond the students of the data above which a warning is given."""
REFUSED = 4.0
"""Factor beyond the students of the data above which there is no recommendation."""
SMALL_STUDENT = 0.1
"""In most published sweeps a student below this share of its teacher's size learns more from a smaller teacher."""
PRUNING = 0.8
"""Share of pruned weights above which pruning is known to lose quality that training does not restore."""


@dataclass(frozen=True)
class Candidate:
    """A teacher of the catalogue."""

    name: str
    teacher: float
    """Parameters."""
    regret: float
    """Expected loss above that of the best teacher within `Advice.within`, in the catalogue or not, nats per token."""
    interval: tuple[float, float]
    """LEVEL interval of the regret."""
    probability: float
    """Probability of being the best candidate."""
    flops: float | None
    """FLOPs of distilling with it, if the tokens are known."""
    losses: tuple[float, float, float]
    """The student's loss in nats per token, after as many tokens as in the data: lower end of the interval, median,
    upper end."""
    against: Against | None = None
    """Comparison with training on labels alone for the same FLOPs; None if `Advice.labels` gives a reason."""


@dataclass(frozen=True)
class Advice:
    """The recommendation for one student."""

    student: float
    beyond: float
    """Factor by which the student is beyond the students of the data; 1 within them."""
    refusal: str | None
    """Reason for no recommendation; all fields below are then empty."""
    best: float | None
    """Median of the best teacher within `within`, in the catalogue or not, parameters."""
    interval: tuple[float, float] | None
    within: tuple[float, float] | None
    """Range of teachers covered by the data, parameters; at an end of it the best teacher may be outside."""
    candidates: tuple[Candidate, ...]
    """Candidates within `within`, in ascending order of expected regret."""
    outside: tuple[str, ...]
    """Names of larger teachers outside `within`."""
    warnings: tuple[str, ...]
    labels: str | None = "not looked at"
    """Reason why distillation cannot be compared with labels alone for the same FLOPs; None if it can."""


def advise(
    process: Process, student: float, catalogue: Mapping[str, float], tokens: float | None = None, init: str = ""
) -> Advice:
    """The recommendation for a student.

    Args:
        process: fitted to runs under the conditions of the planned distillation.
        student: parameters, counted as in the data.
        catalogue: parameters of the available teachers, by name.
        tokens: distillation tokens, for the cost; None leaves the cost out.
        init: initialisation of the data's students; `pruned` adds a warning about heavy pruning.
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
    """The advice with a comparison to labels alone for the same FLOPs, if the records allow one.

    Args:
        advice: for a student.
        taught: the distillation runs that it is based on.
        everything: all records, including those on labels alone.
        count: how parameters are counted, one of `records.COUNTS`.
        tokens: distillation tokens; None takes those of the runs.
    """
    if advice.refusal is not None:
        return advice
    teachers = {each.name: each.teacher for each in advice.candidates}
    found = against(taught, everything, count, advice.student, teachers, tokens)
    if isinstance(found, str):
        return replace(advice, labels=found)
    compared = tuple(replace(each, against=found[each.name]) for each in advice.candidates)
    return replace(advice, candidates=compared, labels=None)


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
