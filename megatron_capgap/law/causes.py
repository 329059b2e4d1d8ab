"""Why a student is worse under a larger teacher: what its start costs, and what the teaching gives.

Runs of the same start, once taught and once on labels alone, differ by the teaching; the luck of the teacher that the
start was pruned out of cancels. What is left, the loss on labels alone, is the start's.
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
"""Conditions that both arms have in common; their objectives differ."""
FEW_PAIRS = 3


@dataclass(frozen=True)
class Cause:
    """One student."""

    student: float
    """Parameters."""
    pairs: int
    """Runs with a counterpart on labels alone."""
    grid: Array
    """Teachers, parameters `[m]`."""
    teaching: Array
    """Quantiles of the loss on labels alone minus the loss taught, nats a token `[3, m]`: above 0 teaching helps."""
    start: Array | None
    """Quantiles of the loss on labels alone `[3, m]`; None where every teacher has the same start."""

    @property
    def rise_of_start(self) -> float:
        """What the start costs more under the largest teacher than under the smallest, nats a token."""
        return 0.0 if self.start is None else float(self.start[1, -1] - self.start[1, 0])

    @property
    def loss_of_teaching(self) -> float:
        """What the teaching gives less under the largest teacher than under the smallest, nats a token."""
        return float(self.teaching[1, 0] - self.teaching[1, -1])


def causes(taught: Sequence[Record], everything: Sequence[Record], count: str) -> list[Cause]:
    """The causes for every student with FEW_PAIRS pairs or more, ascending.

    Args:
        taught: the runs that are studied, under one set of conditions.
        everything: all records, among which the counterparts are.
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
    """The taught runs that have one on labels alone with the same start, seed and tokens, each with that."""
    if not taught[0].taught:
        return []
    alone = {begun(each): each for each in everything if not each.taught and _shared(each) == _shared(taught[0])}
    return [(each, alone[begun(each)]) for each in taught if begun(each) in alone]


def gained(pairs: Sequence[tuple[Record, Record]], count: str, random: np.random.Generator) -> Process:
    """The model of the loss on labels alone minus that taught."""
    return Process(
        cells([replace(one, valid_loss=other.valid_loss - one.valid_loss) for one, other in pairs], count), random
    )


def _curve(process: Process, student: float, ratios: Array) -> Array:
    return quantiles(levelled(process, student, ratios, process.curves(student, ratios, DRAWS)))


def _shared(record: Record) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in SHARED)


def begun(record: Record) -> tuple[object, ...]:
    """Equal for runs that begin with the same weights and read the same text."""
    student = (record.student_params, record.student_params_total, record.seed)
    if not record.init.startswith("pruned"):
        return student
    return (*student, record.teacher_params_total, record.teacher_seed)
