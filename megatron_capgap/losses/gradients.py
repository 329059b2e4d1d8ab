"""Gradients of hidden states and LM head, accumulated over the chunks of a call."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.losses.vocab_shard import VocabShard


class Gradients:
    """Accumulated gradients of hidden states [n / parts, h] and LM head [v/tp, h], each only if requested.

    The head's gradient is accumulated over chunks in the dtype `exact`, either in the head's `main_grad` itself, or in
    a buffer that is rounded to the head's dtype once, at the end, unless the backward pass adds it to a `main_grad`.

    Args:
        hidden, head: the student's tensors.
        shard: this rank's columns.
        parts: number of ranks over which the tokens are sharded.
        needs_grad: of hidden and head.
        exact: fp32 or float64.
        into_main_grad: whether to add the head's gradient to `head.main_grad`, chunk by chunk.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        shard: VocabShard,
        parts: int,
        needs_grad: tuple[bool, bool],
        exact: torch.dtype,
        *,
        into_main_grad: bool,
    ) -> None:
        self.shard, self.parts, self.real_head = shard, parts, head[: shard.width]
        self.head_type = exact if hasattr(head, "main_grad") else head.dtype
        self.of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_grad[0] else None
        self.of_head: Tensor | None = None
        self._sum: Tensor | None = None
        if needs_grad[1] and into_main_grad:
            self._sum = head.main_grad  # type: ignore[attr-defined]
        elif needs_grad[1]:
            self._sum = self.of_head = torch.zeros_like(head, dtype=exact)

    def add_(self, rows: slice, logits: Tensor, hidden: Tensor) -> None:
        """Adds one chunk, given the gradient of its logits [c, w] and its hidden states [c, h]."""
        logits = logits.to(hidden.dtype)
        if self.of_hidden is not None:
            if self.parts == 1:  # partial over the ranks until `finished`
                torch.mm(logits, self.real_head, out=self.of_hidden[rows])
            else:
                self.shard.reduce_rows(torch.mm(logits, self.real_head), self.of_hidden[rows])
        if self._sum is not None:
            _add_product_(self._sum[: self.real_head.shape[0]], logits, hidden)

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients, complete; None for the head's if it is in `main_grad`. Collective: an all-reduce of the
        hidden states' gradient, if it is partial."""
        if self.of_hidden is not None and self.parts < self.shard.size:
            dist.all_reduce(self.of_hidden, group=self.shard.group)
        return self.of_hidden, None if self.of_head is None else self.of_head.to(self.head_type)


def _add_product_(total: Tensor, logits: Tensor, hidden: Tensor) -> None:
    """total [w, h] += logits [c, w]^T @ hidden [c, h]; on a GPU with torch 2.8 or later the product is not rounded to
    the type of its factors."""
    if hidden.dtype == total.dtype:
        total.addmm_(logits.t(), hidden)
    elif _adds_in_fp32() and not total.is_cpu and total.dtype == torch.float32:
        torch.addmm(total, logits.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(logits.t(), hidden))


@cache
def _adds_in_fp32() -> bool:
    """Whether torch.addmm has a variant for bf16 factors and an fp32 sum: from 2.8 on, on GPUs."""
    return hasattr(torch.ops.aten.addmm, "dtype_out")


def dummy_gradient(head: Tensor) -> Tensor | None:
    """The gradient that autograd gets for a head whose gradient is already in `main_grad`.

    Megatron's DDP adds a parameter's gradient to `main_grad` unless `grad_added_to_main_grad` says that this is done,
    and with overlap it requires a gradient of some value. A tied embedding on the same stage (`zero_out_wgrad`) has a
    gradient of its own, which is added as usual: it needs none from here.
    """
    if not hasattr(head, "grad_added_to_main_grad") or getattr(head, "zero_out_wgrad", False):
        return None
    head.grad_added_to_main_grad = True
    return torch.empty_like(head)
