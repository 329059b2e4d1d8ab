"""Part ceilings: versions, and what the device reaches in a large matrix product and a large copy."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from gpu_parts.measure import Bench

LIBRARIES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "liger-kernel",
    "nvidia-modelopt",
    "cut-cross-entropy",
)


def run(bench: Bench) -> None:
    """Rows `versions`, `gemm` (bf16, random data) and `copy` (bytes read and written)."""
    bench.report.add("ceilings", "", "versions", **versions(bench))
    _product(bench, 64 if bench.tiny else 8192)
    bench.collect()
    _copy(bench, 1 << 16 if bench.tiny else 1 << 31)


def _product(bench: Bench, side: int) -> None:
    left, right = bench.randn(side, side), bench.randn(side, side, seed=1)
    out = torch.empty_like(left)
    bench.in_turn(
        "ceilings",
        f"{side} x {side} x {side}",
        {"gemm": lambda: torch.mm(left, right, out=out)},
        lambda name, seconds, peak: {"flops_per_second": 2 * side**3 / seconds},
    )


def _copy(bench: Bench, entries: int) -> None:
    source = torch.ones(entries, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    bench.in_turn(
        "ceilings",
        f"{2 * source.nbytes / 1e9:.1f} GB",
        {"copy": lambda: target.copy_(source)},
        lambda name, seconds, peak: {"bytes_per_second": 2 * source.nbytes / seconds},
    )


def versions(bench: Bench) -> dict[str, str]:
    """Versions of the libraries, and the device."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    if bench.cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
        found |= {"cuda": str(torch.version.cuda), "multiprocessors": str(properties.multi_processor_count)}
    return found
