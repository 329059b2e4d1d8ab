"""Text generation in any layout."""

from megatron_capgap.generation.decode import generate
from megatron_capgap.generation.sampling import Sampling

__all__ = ["Sampling", "generate"]
