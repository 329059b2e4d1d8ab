"""What teachers cost: FLOPs and GPU-hours of distilling, of searching for the teacher, and what the law saves.

One rule for all, the note's: a token costs 6 operations a student parameter (forward, and backward twice as much) and 2
a teacher parameter (forward alone).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_capgap.law.records import Record

GPU_PEAK = 312e12
"""Dense bf16 operations a second of an A100."""
MFU = 0.4
"""Share of the peak that a training run is supposed to reach."""


def distill_flops(student: float, teacher: float, tokens: float) -> float:
    """Operations of distilling `tokens` tokens out of a teacher; sizes in parameters."""
    return (6.0 * student + 2.0 * teacher) * tokens


def training_flops(size: float, tokens: float) -> float:
    """Operations of training a model on `tokens` tokens without a teacher."""
    return 6.0 * size * tokens


def gpu_hours(flops: float, mfu: float = MFU, peak: float = GPU_PEAK) -> float:
    """Hours that one GPU would need.

    Args:
        flops: operations.
        mfu: share of the peak that is reached, above 0 and at most 1.
        peak: operations a second.
    """
    return flops / (mfu * peak) / 3600.0


@dataclass(frozen=True)
class Saving:
    """One student: the law's teacher against trying every candidate."""

    chosen: float
    """Operations of distilling with the teacher that the law names."""
    search: float
    """Operations of distilling with every candidate in turn."""
    pilot: float
    """Operations of the pilot's distillations."""
    pilot_teachers: float
    """Operations of training the pilot's teachers; they often exist already."""

    @property
    def saved(self) -> float:
        """What the law saves for each student that is wanted."""
        return self.search - self.chosen

    def breaks_even(self, with_teachers: bool) -> int | None:
        """Number of students after which the pilot has paid for itself; None where it never does."""
        spent = self.pilot + (self.pilot_teachers if with_teachers else 0.0)
        return math.ceil(spent / self.saved) if self.saved > 0 else None


def saving(
    student: float, chosen: float, candidates: Sequence[float], tokens: float, records: Sequence[Record]
) -> Saving:
    """Cost with and without the law.

    Args:
        student: parameters of the student that is wanted.
        chosen: of the teacher that the law names.
        candidates: of the teachers that a search would try.
        tokens: that the student is to be distilled on.
        records: the pilot.
    """
    trained = {record.teacher_params_total: record for record in records}
    return Saving(
        chosen=distill_flops(student, chosen, tokens),
        search=sum(distill_flops(student, candidate, tokens) for candidate in candidates),
        pilot=sum(spent(record) for record in records),
        pilot_teachers=sum(
            training_flops(record.teacher_params_total, record.teacher_tokens or 0) for record in trained.values()
        ),
    )


def spent(record: Record) -> float:
    """Operations of one recorded run: as told, or by the rule from all parameters."""
    if record.flops is not None:
        return record.flops
    return distill_flops(*record.sizes("total"), record.tokens)
