"""GPUs: memory, peak rates and bandwidths."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import Precision

GIB = 1 << 30
USABLE = 0.92
"""Assumed share of a GPU's memory for the run; the rest is for the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Rates are of dense products, without sparsity.

    Sources: NVIDIA's data sheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU" (SXM: 989 TFLOP/s in bf16, 1979 in
    FP8, 67 in fp32, NVLink 900 GB/s in both directions together, memory 3.35 and 4.8 TB/s) and "A100 80GB" (SXM: 312 in
    bf16, 19.5 in fp32, NVLink 600 GB/s, 2.039 TB/s). Memory: as nvidia-smi reports it. Network: one adapter per GPU,
    400 Gbit/s in DGX H100 and H200, 200 Gbit/s in DGX A100. Host: PCI Express 5.0 and 4.0 x16, one direction.
    """

    name: str
    gib: float
    """Memory, GiB."""
    bf16: float
    """TFLOP/s."""
    fp8: float | None
    """TFLOP/s; None without FP8."""
    fp32: float
    """TFLOP/s."""
    memory_bandwidth: float
    """GB/s of device memory."""
    nvlink: float
    """GB/s per direction between GPUs of a node."""
    network: float
    """GB/s per GPU between nodes."""
    host: float
    """GB/s from host memory."""
    capability: tuple[int, int] | None
    per_node: int = 8

    def peak(self, precision: Precision) -> float:
        """Peak TFLOP/s of the transformer layers' products."""
        if precision.fp8 is not None and self.fp8 is not None:
            return self.fp8
        return self.bf16 if precision.compute == "bf16" else self.fp32


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80", 79.6, 989, 1979, 67, 3350, 450, 50, 55, (9, 0)),
        Gpu("h200", 140.4, 989, 1979, 67, 4800, 450, 50, 55, (9, 0)),
        Gpu("a100-80", 80.0, 312, None, 19.5, 2039, 300, 25, 27, (8, 0)),
    )
}


def gpu_named(given: str, peak_tflops: float | None) -> Gpu:
    """The GPU of `--gpu`.

    Args:
        given: a name of `GPUS`, or a number of GiB; the rates are then those of an H100.
        peak_tflops: runtime.peak_tflops, which takes the place of the peak in the compute type.

    Raises:
        UserError: neither of both.
    """
    gpu = GPUS.get(given.lower())
    if gpu is None:
        try:
            gib = float(given)
        except ValueError:
            gib = 0.0
        if not 0 < gib < float("inf"):
            names = ", ".join(GPUS)
            raise UserError(
                f"--gpu: {given} given; valid values: {names}, or the memory of a GPU in GiB, for example 24"
            )
        gpu = replace(GPUS["h100-80"], name=f"{gib:g} GiB", gib=gib, capability=None)
    if peak_tflops is not None:
        gpu = replace(gpu, bf16=peak_tflops, fp32=peak_tflops, fp8=peak_tflops * 2 if gpu.fp8 else None)
    return gpu
