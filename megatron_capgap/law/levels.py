"""Predicted losses of a student including its level, also for unseen students."""

from __future__ import annotations

import numpy as np

from megatron_capgap.law.cells import Array, Cells
from megatron_capgap.law.gaussian_process import SAME, Process, root_of

SCALES = 50
"""Number of draws of the scales."""


def losses(process: Process, student: float, ratios: Array, draws: int) -> Array:
    """Draws of a student's loss under teachers of average training, mean over seeds, nats per token `[draws, m]`.

    A student of the data has the level of its runs. The level of another student is on the line in log S through the
    levels of its two neighbours, or of the two nearest students; the scatter about that line is not included.

    Args:
        process: the model.
        student: parameters.
        ratios: log(T / S) `[m]`.
        draws: number of them.
    """
    beside = _beside(process.cells.students(), student)
    cells, luck = process.cells, process.teachers()
    own = [cells.student == each for each in beside]
    curves = [(student, ratios), *((size, process.d[mine]) for size, mine in zip(beside, own, strict=True))]
    ends = np.cumsum([len(points) for _, points in curves])
    none, numbers = np.zeros(0), np.zeros(0, dtype=np.int64)
    no_runs = Cells(none, none, numbers, numbers, none, none)
    chosen = np.unique(np.linspace(0, len(process.draws) - 1, SCALES).round().astype(int))
    found = []
    counts = np.diff(np.linspace(0, draws, len(chosen) + 1).round().astype(int))
    for number, count in zip(chosen.tolist(), counts.tolist(), strict=True):
        mean, covariance = process.moments(number, curves, no_runs)
        drawn = mean + process.random.standard_normal((count, len(mean))) @ root_of(covariance).T
        levels = []
        for mine, end in zip(own, ends[1:], strict=True):
            seen = float(np.mean(cells.loss[mine] - luck[cells.training[mine]]))
            levels.append(seen - drawn[:, end - mine.sum() : end].mean(axis=1))
        found.append(drawn[:, : len(ratios)] + _between(beside, levels, student)[:, None])
    return np.concatenate(found)


def _beside(known: list[float], student: float) -> list[float]:
    same = [size for size in known if abs(np.log(size / student)) < SAME]
    if same or len(known) == 1:
        return same or known
    at = int(np.clip(np.searchsorted(known, student), 1, len(known) - 1))
    return known[at - 1 : at + 1]


def _between(beside: list[float], levels: list[Array], student: float) -> Array:
    if len(levels) == 1:
        return levels[0]
    share = np.log(student / beside[0]) / np.log(beside[1] / beside[0])
    return (1 - share) * levels[0] + share * levels[1]
