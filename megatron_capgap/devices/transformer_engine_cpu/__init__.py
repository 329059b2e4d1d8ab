"""Transformer Engine's own Python modules on a CPU: a stand-in for its compiled extension, and nothing else.

`install` comes before `megatron.core` is first imported, since Megatron looks for Transformer Engine as it is imported.
"""

from megatron_capgap.devices.transformer_engine_cpu.gemm import Gemm, counts, reset_counts
from megatron_capgap.devices.transformer_engine_cpu.install import install

__all__ = ["Gemm", "counts", "install", "reset_counts"]
