"""Part profile: the kernels of one training step, and the time between them."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from gpu_parts import tracing
from gpu_parts.hf_loop import HuggingFaceLoop, liger_is_usable
from gpu_parts.measure import Bench
from gpu_parts.product import Product, one_rank
from gpu_parts.shapes import CASES, TINY_CASES
from gpu_parts.step import OURS, PEER, Contender

TOP, SHOWN = 30, 8


def run(bench: Bench) -> None:
    """For ours and the loop on Hugging Face models: a row of the step, one for each of its longest kernels, a trace."""
    one_rank(bench)
    case = (TINY_CASES if bench.tiny else CASES)[0]
    depth = case.depths[1]
    builds: dict[str, Callable[[], Contender]] = {
        OURS: lambda: Product(bench, case, depth),
        PEER: lambda: HuggingFaceLoop(bench, case, depth, torch.float32, liger_is_usable(bench)),
    }
    where = f"{case.name}, {depth} layers"
    for name, build in builds.items():
        bench.check_time()
        contender = bench.attempt("profile", where, name, build)
        if contender is not None:
            bench.attempt("profile", where, name, lambda n=name, c=contender: _profile(bench, where, n, c))
            contender.free()
            del contender
            bench.collect()


def _profile(bench: Bench, where: str, name: str, contender: Contender) -> None:
    for _ in range(2):
        contender.step()
    alone = statistics.median(bench.seconds(contender.step) for _ in range(3)) * 1e6
    trace = bench.out / f"trace_{name.split(',')[0].replace(' ', '_')}.json.gz"
    found = tracing.kernels_of(bench, contender.step, trace)
    busy, span = tracing.busy(found)
    products = sum(kernel.end - kernel.start for kernel in found if tracing.is_gemm(kernel.name))
    bench.report.add(
        "profile",
        where,
        name,
        kernels=len(found),
        ms=alone / 1e3,
        busy_ms=busy / 1e3,
        matrix_products_ms=products / 1e3,
        # Of the step without the profiler, which slows the host down but no kernel.
        gaps=max(0.0, 1 - busy / alone),
        gaps_under_the_profiler=1 - busy / span,
    )
    for index, (kernel, calls, microseconds) in enumerate(tracing.by_name(found)[:TOP]):
        values = {"calls": calls, "ms": microseconds / 1e3, "share": microseconds / busy}
        bench.report.add("profile", f"{where}, {name}", kernel[:100], quiet=index >= SHOWN, **values)
