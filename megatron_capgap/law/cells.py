"""Converts records to the arrays that the model of all cells is fitted to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_capgap.law.files import LawError
from megatron_capgap.law.records import Record

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]

SAME_SIZE = 0.02
"""Relative difference below which sizes count as one student: pruning to a sparsity does not hit a size exactly."""
SAME_LOSS = 0.002
"""Nats per token by which evaluations of one teacher may differ."""
QUADRATIC_FROM, LINEAR_FROM = 8, 5
"""Minimum numbers of teacher sizes to fit the trend of the teachers' own losses with curvature, and with a slope. With
fewer sizes a training is compared only with others of its size."""


@dataclass(frozen=True)
class Cells:
    """All runs under one set of conditions as arrays `[n]`, without averaging or omission."""

    student: Array
    """Parameters; equal for runs of one student."""
    teacher: Array
    """Parameters."""
    curve: Numbers
    """Index of the (student, seed) pair. A seed's data order and initial weights shift its whole curve."""
    training: Numbers
    """Index of the teacher's training."""
    loss: Array
    """The student's held-out loss, nats per token."""
    quality: Array
    """The teacher's own held-out loss minus the trend over sizes, nats per token; 0 if unknown."""

    def __len__(self) -> int:
        return len(self.loss)

    def students(self) -> list[float]:
        """Parameters of the students, ascending."""
        return np.unique(self.student).tolist()

    def chosen(self, keep: Mask) -> Cells:
        """The runs where `keep` `[n]` is true."""
        return Cells(
            student=self.student[keep],
            teacher=self.teacher[keep],
            curve=self.curve[keep],
            training=self.training[keep],
            loss=self.loss[keep],
            quality=self.quality[keep],
        )


@dataclass(frozen=True)
class Training:
    """One training of a teacher."""

    size: int
    """Parameters."""
    seed: int | None
    """Seed that identifies the training among those of its size; None if not recorded."""
    tokens: int | None
    """Tokens it was trained on."""
    loss: float | None
    """Its own held-out loss, nats per token."""


def cells(records: Sequence[Record], count: str) -> Cells:
    """The runs as arrays.

    Args:
        records: under one set of conditions, from `records.select`.
        count: how parameters are counted, one of `records.COUNTS`.

    Raises:
        LawError: one training of a teacher has two losses.
    """
    known = trainings(records, count)
    number = {(training.size, training.seed): index for index, training in enumerate(known)}
    which = np.array([number[record.sizes(count)[1], record.teacher_seed] for record in records])
    student = _merged(np.array([record.sizes(count)[0] for record in records], dtype=np.float64))
    curves = list(zip(student.tolist(), [record.seed for record in records], strict=True))
    return Cells(
        student=student,
        teacher=np.array([record.sizes(count)[1] for record in records], dtype=np.float64),
        curve=_numbers(curves),
        training=which,
        loss=np.array([record.valid_loss for record in records]),
        quality=_quality(known)[which],
    )


def trainings(records: Sequence[Record], count: str) -> list[Training]:
    """Every training of a teacher, ascending by size: one per size and `teacher_seed`. Its loss is the mean over its
    records, which may differ by SAME_LOSS.

    Raises:
        LawError: records of one size and teacher_seed have different losses or tokens.
    """
    groups: dict[tuple[int, int | None], list[Record]] = {}
    for record in records:
        groups.setdefault((record.sizes(count)[1], record.teacher_seed), []).append(record)
    found = []
    for (size, seed), group in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        tokens = {each.teacher_tokens for each in group}
        losses = [each.teacher_valid_loss for each in group if each.teacher_valid_loss is not None]
        for name, values in (("teacher_tokens", tokens), ("teacher_valid_loss", losses)):
            if len(set(values)) > 1 and (name == "teacher_tokens" or max(losses) - min(losses) > SAME_LOSS):
                distinct = sorted(set(values), key=lambda value: (value is not None, value))
                raise LawError(
                    f"teacher of {size:,} parameters, teacher_seed {'not told' if seed is None else seed}: {name} is "
                    f"{distinct[0]} in some records and {distinct[-1]} in others; give each training of a teacher a "
                    "teacher_seed of its own"
                )
        found.append(Training(size, seed, tokens.pop(), float(np.mean(losses)) if losses else None))
    return found


def _merged(sizes: Array) -> Array:
    """Replaces sizes within SAME_SIZE of the smallest of their group by the geometric mean of the group."""
    order, merged, start = np.argsort(sizes, kind="stable"), sizes.copy(), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or sizes[order[end]] > sizes[order[start]] * (1 + SAME_SIZE):
            group = order[start:end]
            merged[group] = np.exp(np.log(sizes[group]).mean())
            start = end
    return merged


def _numbers(keys: Sequence[Hashable]) -> Numbers:
    """Indices of the keys; equal keys have equal indices."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys])


def _quality(known: Sequence[Training]) -> Array:
    """Each training's loss minus the trend over sizes; 0 if it has no loss."""
    with_loss = [index for index, training in enumerate(known) if training.loss is not None]
    found = np.zeros(len(known))
    if with_loss:
        x = np.log([float(known[index].size) for index in with_loss])
        y = np.array([known[index].loss for index in with_loss], dtype=np.float64)
        sizes = len(set(x.tolist()))
        if sizes >= LINEAR_FROM:
            trend = np.polyval(np.polyfit(x - x.mean(), y, 2 if sizes >= QUADRATIC_FROM else 1), x - x.mean())
        else:
            trend = np.array([y[x == size].mean() for size in x])
        found[with_loss] = y - trend
    return found
