"""Small language models out of large ones, at cluster scale, on Megatron-Core.

Entry points: `python -m megatron_capgap STAGE --config FILE`, and the functions below. docs/architecture.md lists the
packages and their allowed imports.
"""

from megatron_capgap.api import Result, adapt, distill, evaluate, finetune, prune, run
from megatron_capgap.common.errors import UserError

__all__ = ["Result", "UserError", "adapt", "distill", "evaluate", "finetune", "prune", "run"]
__version__ = "0.1.0"
