"""Causes of a higher loss under a larger teacher: the effect of the initialisation, and the effect of teaching.

Two runs from the same start, one distilled and one on labels alone, differ by the effect of teaching; the random effect
of the training of the teacher that the start was pruned from cancels. The loss on labels alone is the effect of the
initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_capgap.law.cells import Array, cells
from megatron_capgap.law.gaussian_process import Process
from megatron_capgap.law.records import Record
from megatron_capgap.law.verdict import DRAWS, levelled, quantiles, span

SHARED = ("family", "init", "tokens", "valid_tokens", "tokenizer")
"""Conditions shared by both runs of a pair; their objectives differ."""
FEW_PAIRS = 3


@dataclass(frozen=True)
class Cause:
    """The causes for one student."""

    student: float
    """Parameters."""
    pairs: int
    """Number of runs with a counterpart on labels alone."""
    grid: Array
    """Teachers, parameters `[m]`."""
    teaching: Array
    """Quantiles of the loss on labels alone minus the distilled loss, nats per token `[3, m]`; > 0: teaching helps."""
    start: Array | None
    """Quantiles of the loss on labels alone `[3, m]`; None if all teachers have the same start."""

    @property
    def rise_of_start(self) -> float:
        """Loss on labels alone under the largest teacher's start above that under the smallest's, nats per token."""
        return 0.0 if self.start is None else float(self.start[1, -1] - self.start[1, 0])

    @property
    def loss_of_teaching(self) -> float:
        """Gain from teaching under the smallest teacher above that under the largest, nats per token."""
        return float(self.teaching[1, 0] - self.teaching[1, -1])


def causes(taught: Sequence[Record], everything: Sequence[Record], count: str) -> list[Cause]:
    """The causes for every student with at least FEW_PAIRS pairs, ascending.

    Args:
        taught: the distillation runs, under one set of conditions.
        everything: all records, including the counterparts.
        count: how parameters are counted, one of `records.COUNTS`.
    """
    pairs = counterparts(taught, everything)
    if not pairs:
        return []
    random = np.random.default_rng(0)
    teaching = gained(pairs, count, random)
    start = None
    if taught[0].init.startswith("pruned"):
        start = Process(cells([replace(one, valid_loss=other.valid_loss) for one, other in pairs], count), random)
    found = []
    for student in teaching.cells.students():
        number = int((teaching.cells.student == student).sum())
        if number >= FEW_PAIRS:
            ratios = span(teaching, student)
            assert ratios is not None, "a student of the data has teachers"
            grid = student * np.exp(ratios)
            own = None if start is None else _curve(start, student, ratios)
            found.append(Cause(student, number, grid, _curve(teaching, student, ratios), own))
    return found


def counterparts(taught: Sequence[Record], everything: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Pairs (distilled run, run on labels alone) with the same start, seed and tokens."""
    if not taught[0].taught:
        return []
    alone = {start_key(each): each for each in everything if not each.taught and _shared(each) == _shared(taught[0])}
    return [(each, alone[start_key(each)]) for each in taught if start_key(each) in alone]


def gained(pairs: Sequence[tuple[Record, Record]], count: str, random: np.random.Generator) -> Process:
    """The model of the loss on labels alone minus the distilled loss."""
    return Process(
        cells([replace(one, valid_loss=other.valid_loss - one.valid_loss) for one, other in pairs], count), random
    )


def _curve(process: Process, student: float, ratios: Array) -> Array:
    return quantiles(levelled(process, student, ratios, process.curves(student, ratios, DRAWS)))


def _shared(record: Record) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in SHARED)


def start_key(record: Record) -> tuple[object, ...]:
    """A key that is equal for runs with the same initial weights and the same text."""
    student = (record.student_params, record.student_params_total, record.seed)
    if not record.init.startswith("pruned"):
        return student
    return (*student, record.teacher_params_total, record.teacher_seed)
