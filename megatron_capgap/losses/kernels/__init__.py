"""The passes of the loss over a chunk of logits as Triton kernels, for GPUs; imports Triton.

`formulas` turns the rows of the table of divergences into Triton source, `passes` holds the kernels, and `chunk` calls
them for one chunk of tokens, with the interface of `losses.eager`.
"""

from megatron_capgap.losses.kernels.chunk import TritonPasses, in_interpreter, rows_of_logits

__all__ = ["TritonPasses", "in_interpreter", "rows_of_logits"]
