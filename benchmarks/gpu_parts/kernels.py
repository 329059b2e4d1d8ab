"""Part kernels: what a call of the loss spends outside of its matrix products, kernel by kernel, by the profiler."""

from __future__ import annotations

from gpu_parts import loss, tracing
from gpu_parts.measure import Bench
from gpu_parts.problems import CHUNKS, SIZES, TINY_CHUNKS, TINY_SIZES, Contender, Problem, Size

# Bytes that a pass moves for an entry of the logits: it reads both models' logits in bf16, and one writes a gradient.
BYTES_PER_ENTRY = {"statistics": 4, "gradient": 6}


def run(bench: Bench) -> None:
    """For each kind of kernels: a row of the whole call, and one for each of its longest kernels."""
    size = (TINY_SIZES if bench.tiny else SIZES)[0]
    chunk = (TINY_CHUNKS if bench.tiny else CHUNKS)[1]
    problem = Problem.random(bench, size)
    for kernels in loss.KERNELS:
        bench.check_time()
        if reason := loss.unavailable(bench, kernels):
            bench.report.add("kernels", size.case, kernels, absent=f"not available: {reason}")
            continue
        contender = loss.ours(kernels, chunk)
        bench.attempt("kernels", size.case, kernels, lambda c=contender: _profile(bench, size, problem, c))


def _profile(bench: Bench, size: Size, problem: Problem, contender: Contender) -> None:
    contender.step(problem)
    contender.step(problem)
    found = tracing.kernels_of(bench, lambda: contender.step(problem))
    busy, span = tracing.busy(found)
    products = sum(kernel.end - kernel.start for kernel in found if tracing.is_gemm(kernel.name))
    bench.report.add(
        "kernels",
        size.case,
        contender.name,
        calls=len(found),
        busy_ms=busy / 1e3,
        span_ms=span / 1e3,
        matrix_products_ms=products / 1e3,
    )
    others = [row for row in tracing.by_name(found) if not tracing.is_gemm(row[0])]
    for name, calls, microseconds in others[:12]:
        per_entry = next((value for word, value in BYTES_PER_ENTRY.items() if word in name), None)
        values = {"calls": calls, "ms": microseconds / 1e3}
        if per_entry and contender.kernels == "triton":
            values["bytes_per_second"] = per_entry * size.tokens * size.vocab / (microseconds / 1e6)
        bench.report.add("kernels", f"{size.case}, {contender.kernels}", name[:100], **values)
