"""CPU emulation of Transformer Engine's compiled extension; Transformer Engine's own Python modules run on it.

Call `install` before `megatron.core` is first imported, because Megatron looks for Transformer Engine at import.
"""

from megatron_capgap.devices.transformer_engine_cpu.gemm import Gemm, counts, reset_counts
from megatron_capgap.devices.transformer_engine_cpu.install import install

__all__ = ["Gemm", "counts", "install", "reset_counts"]
