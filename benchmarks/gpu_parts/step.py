"""Part step: training steps of this project and of a loop on Hugging Face models, at two depths, extrapolated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch

from gpu_parts.hf_loop import HuggingFaceLoop, liger_is_usable
from gpu_parts.measure import Bench
from gpu_parts.product import Product, one_rank
from gpu_parts.shapes import CASES, TINY_CASES, Case
from megatron_capgap.models import size

PEAK_FLOPS = 989e12
"""Dense bf16 of an H100 or H200 by the data sheet."""
OURS = "ours"
CROSS_ENTROPY = "ours, cross-entropy alone"
PEER = "Hugging Face, fp32 weights"
NARROW_PEER = "Hugging Face, bf16 weights"
TEACHER = ", teacher alone"


class Contender(Protocol):
    """A student and its teacher."""

    def step(self) -> None: ...
    def teacher_forward(self) -> None: ...
    def free(self) -> None: ...


def run(bench: Bench) -> None:
    """Rows of each case and depth (ms, peak_bytes, tokens_per_second, mfu), then of the model with all its layers.

    Contenders follow each other, since each needs the memory: `peak_bytes` counts all that it holds.
    """
    one_rank(bench)  # before transformers, which must not import what the device hides
    cases = TINY_CASES if bench.tiny else CASES
    seconds: dict[tuple[str, int], dict[str, float]] = {}
    for case in cases:
        for depth in reversed(case.depths):
            found = _measure(bench, case, depth, OURS, lambda c=case, d=depth: Product(bench, c, d))
            found |= _peer(bench, case, depth, PEER, torch.float32)
            seconds[case.name, depth] = found
        _extrapolate(bench, case, seconds)
    for case in cases:
        _peer(bench, case, case.depths[1], NARROW_PEER, torch.bfloat16)


def _peer(bench: Bench, case: Case, depth: int, name: str, weights: torch.dtype) -> dict[str, float]:
    """The loop on Hugging Face models, with Liger's kernels and loss where they work."""
    for liger in [True, False] if liger_is_usable(bench) else [False]:
        found = _measure(bench, case, depth, name, lambda on=liger: HuggingFaceLoop(bench, case, depth, weights, on))
        if name in found:
            used = "yes" if liger else "no: torch's own"
            bench.report.add("step", f"{case.name}, {depth} layers", f"{name}: Liger", used=used)
            return found
    return {}


def _measure(bench: Bench, case: Case, depth: int, name: str, build: Callable[[], Contender]) -> dict[str, float]:
    """Builds a contender, times its step, the teacher alone and, if ours, the cross-entropy step; frees it.

    Returns:
        Median seconds by name.
    """
    bench.check_time()
    where = f"{case.name}, {depth} layers"
    bench.collect()
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    contender = bench.attempt("step", where, name, build)
    if contender is None:
        return {}
    runs: dict[str, Callable[[], object]] = {name: contender.step, name + TEACHER: contender.teacher_forward}
    if isinstance(contender, Product):
        runs[CROSS_ENTROPY] = contender.cross_entropy_step

    def values(which: str, seconds: float, peak: int | None) -> dict[str, Any]:
        # Since the last warm-up call; with weights and the optimizer's state.
        total = torch.cuda.max_memory_allocated() - before if bench.cuda else None
        if which != name:
            return {"peak_bytes": total}
        return {"peak_bytes": total, **_speed(case, depth, depth, seconds)}

    # One after the other: the first call of a step allocates the optimizer's state, which others would see.
    found: dict[str, float] = {}
    for which, one in runs.items():
        found |= bench.in_turn("step", where, {which: one}, values)
    contender.free()
    return found


def _speed(case: Case, student: int, teacher: int, seconds: float) -> dict[str, float]:
    """Tokens a second and model FLOP utilisation, the teacher's forward counted."""
    flops = size.training_flops(
        replace(case.student, layers=student), replace(case.teacher, layers=teacher), case.length
    )
    rate = case.tokens / seconds
    return {"tokens_per_second": rate, "flops_per_second": rate * flops, "mfu": rate * flops / PEAK_FLOPS}


def _extrapolate(bench: Bench, case: Case, seconds: dict[tuple[str, int], dict[str, float]]) -> None:
    """Rows of the whole models, from the time per layer between two depths.

    A step grows by one student layer and one teacher layer between depths; the teacher's part is that of its forward
    pass alone. Everything else (heads, loss, embedding, waits) is taken as independent of the depth.
    """
    few, many = (seconds.get((case.name, depth), {}) for depth in case.depths)
    shallow, deep = case.depths

    def a_layer(name: str) -> float:
        return (many[name] - few[name]) / (deep - shallow)

    for name in (OURS, PEER):
        names = (name, name + TEACHER)
        if all(n in few and n in many for n in names):
            teacher = a_layer(name + TEACHER)
            student = a_layer(name) - teacher
            whole = many[name] + student * (case.student.layers - deep) + teacher * (case.teacher.layers - deep)
            values = {"ms": whole * 1e3, "student_layer_ms": student * 1e3, "teacher_layer_ms": teacher * 1e3}
            if whole > 0:
                values |= _speed(case, case.student.layers, case.teacher.layers, whole)
            bench.report.add("step", f"{case.name}, extrapolated", name, **values)
    if CROSS_ENTROPY in few and CROSS_ENTROPY in many:
        layer = a_layer(CROSS_ENTROPY)
        whole = many[CROSS_ENTROPY] + layer * (case.student.layers - deep)
        student, teacher = _multiplied(case.student), _multiplied(case.teacher)
        values = {"ms": whole * 1e3, "student_layer_ms": layer * 1e3, "allowed": 1 + teacher / (3 * student)}
        bench.report.add("step", f"{case.name}, extrapolated", CROSS_ENTROPY, **values)


def _multiplied(shape: Any) -> int:
    """Parameters that a forward pass multiplies with: layers and LM head."""
    return size.non_embedding_parameters(shape) + shape.vocab * shape.hidden
