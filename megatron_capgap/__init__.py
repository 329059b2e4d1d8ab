"""Small language models out of large ones, at cluster scale, on Megatron-Core.

Entry point: `python -m megatron_capgap STAGE --config FILE`. docs/architecture.md lists the packages and their allowed
imports.
"""

__version__ = "0.1.0"
