"""Cost of training and distilling: FLOPs and GPU-hours.

Rule: a token costs 6 FLOPs per student parameter (forward, and twice as much for backward) and 2 per teacher parameter
(forward only).
"""

from __future__ import annotations

from megatron_capgap.law.records import Record

GPU_PEAK = 312e12
"""Dense bf16 FLOP/s of an A100."""
MFU = 0.4
"""Assumed share of the peak that a training run reaches (MFU)."""


def distill_flops(student: float, teacher: float, tokens: float) -> float:
    """FLOPs of distilling a student from a teacher on `tokens` tokens; sizes in parameters."""
    return (6.0 * student + 2.0 * teacher) * tokens


def training_flops(size: float, tokens: float) -> float:
    """FLOPs of training a model on `tokens` tokens without a teacher."""
    return 6.0 * size * tokens


def gpu_hours(flops: float, mfu: float = MFU, peak: float = GPU_PEAK) -> float:
    """Hours that one GPU needs.

    Args:
        flops: number of operations.
        mfu: share of the peak that is reached, above 0 and at most 1.
        peak: FLOP/s.
    """
    return flops / (mfu * peak) / 3600.0


def spent(record: Record) -> float:
    """FLOPs of one run: as recorded, otherwise by the rule from all parameters."""
    if record.flops is not None:
        return record.flops
    return distill_flops(*record.sizes("total"), record.tokens)
