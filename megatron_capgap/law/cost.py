"""What teachers cost: FLOPs and GPU-hours of training and of distilling.

One rule for all, the note's: a token costs 6 operations a student parameter (forward, and backward twice as much) and 2
a teacher parameter (forward alone).
"""

from __future__ import annotations

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


def spent(record: Record) -> float:
    """Operations of one recorded run: as told, or by the rule from all parameters."""
    if record.flops is not None:
        return record.flops
    return distill_flops(*record.sizes("total"), record.tokens)
