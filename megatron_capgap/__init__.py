"""Small language models out of large ones, at cluster scale, on Megatron-Core.

The door is `python -m megatron_capgap STAGE --config FILE`; the rooms and what each may import are drawn in README.md.
"""

__version__ = "0.1.0"
