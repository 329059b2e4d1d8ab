"""What the profiler says of one call: kernels, and the gaps between them."""

from __future__ import annotations

import gzip
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_parts.measure import Bench


@dataclass(frozen=True)
class Kernel:
    """One kernel on a GPU; on a CPU one operator of torch, which may run within another."""

    name: str
    start: float
    """Microseconds."""
    end: float


GEMM = ("gemm", "cutlass", "nvjet", "sm90_xmma", "aten::mm", "aten::addmm")
"""Parts of the names of matrix products."""


def is_gemm(name: str) -> bool:
    """Whether a kernel is a matrix product, by its name."""
    return any(word in name.lower() for word in GEMM)


def kernels_of(bench: Bench, run: Callable[[], object], trace: Path | None = None) -> list[Kernel]:
    """The kernels of one call; with `trace`, also a gzipped trace for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=activities) as recorded:
        run()
        if bench.cuda:
            torch.cuda.synchronize()
    if trace is not None:
        plain = trace.with_suffix("")
        recorded.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(trace, "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
    wanted = DeviceType.CUDA if bench.cuda else DeviceType.CPU
    found = []
    for event in recorded.events():
        # The optimizer marks its step on the GPU's time line, too.
        mark = getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "ProfilerStep"))
        if event.device_type == wanted and not mark and (bench.cuda or event.name.startswith("aten::")):
            found.append(Kernel(event.name, event.time_range.start, event.time_range.end))
    return sorted(found, key=lambda kernel: kernel.start)


def busy(kernels: Sequence[Kernel]) -> tuple[float, float]:
    """(microseconds in which at least one kernel runs, microseconds from the first start to the last end)."""
    if not kernels:
        return 0.0, 0.0
    total, reached = 0.0, kernels[0].start
    for kernel in kernels:  # sorted by start
        total += max(0.0, kernel.end - max(reached, kernel.start))
        reached = max(reached, kernel.end)
    return total, reached - kernels[0].start


def by_name(kernels: Iterable[Kernel]) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds), the longest first."""
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        calls[kernel.name] += 1
        times[kernel.name] += kernel.end - kernel.start
    return sorted(((name, calls[name], times[name]) for name in calls), key=lambda row: -row[2])
