"""The three passes over a chunk of logits, by Triton kernels: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.comparison import SparseComparison
from megatron_capgap.losses.divergences import DIVERGENCES
from megatron_capgap.losses.kernels import passes
from megatron_capgap.losses.kernels.formulas import triton_formula
from megatron_capgap.losses.kernels.passes import DENSE, NONE, RESOLVED, SPARSE, WEIGHTS
from megatron_capgap.losses.vocab_shard import LOG_OF_NOTHING, VocabShard

# Columns a program reads at a time, and its warps: of the passes that walk over a row, of the gradient; tokens of
# `resolve`.
ROW_BLOCK, ROW_WARPS = 4096, 8
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
TOKEN_BLOCK = 128

_LSE, _LSE_OF_TEMPERED, _, _CROSS_ENTROPY, _DIVERGENCE, _TERM = range(len(RESOLVED))
_STATISTICS = {(NONE, 0): 2, (SPARSE, 0): 3, (DENSE, 0): 4, (DENSE, 1): 6, (DENSE, 2): 6}
"""Rows of the statistics, by MODE and WEIGHT."""


class TritonPasses:
    """As `losses.eager.Passes`.

    Args:
        student: [c, w] logits in rows of a multiple of 16 numbers, see `rows_of_logits`; `gradient_` overwrites them.
        teacher: the teacher's logits, likewise, not divided by the temperature, read only; or a comparison with a
            sparse teacher; None without a teacher.
        labels: [c] ids in the whole vocabulary; a label outside it needs weight 0.
        objective: divergence, weights and temperature.
        shard: this rank's columns.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor | SparseComparison | None,
        labels: Tensor,
        objective: ObjectiveConfig,
        shard: VocabShard,
    ) -> None:
        # The kernels step through tensors of one number per token; a chunk of several ranks' tokens may be strided.
        self.student, self.labels, self.objective, self.shard = student, labels.contiguous(), objective, shard
        self.sparse = teacher if isinstance(teacher, SparseComparison) else None
        self.teacher = teacher if isinstance(teacher, Tensor) else student  # a kernel needs some pointer
        self.mode = NONE if teacher is None else SPARSE if self.sparse else DENSE
        assert student.stride(0) % 16 == 0 and (self.teacher.stride() == student.stride()), "see rows_of_logits"
        self.exact = torch.float64 if student.dtype == torch.float64 else torch.float32
        row = DIVERGENCES[objective.divergence]
        self.weight = WEIGHTS[row.shard_weight] if self.mode == DENSE else 0
        temperature = objective.temperature
        self._common: dict[str, Any] = {"EXACT": tl.float64 if self.exact == torch.float64 else tl.float32}
        self._scale: dict[str, Any] = {
            "TEMPERED": self.mode != NONE and temperature != 1,
            "INVERSE": 1 / temperature,
            **self._common,
        }
        self._formula = {"FORMULA": triton_formula(objective, self.exact) if self.mode == DENSE else None}
        self._row_pass: Any = partial(passes.launch, BLOCK=ROW_BLOCK, num_warps=ROW_WARPS, **self._scale)

    def statistics(self) -> Tensor:
        """[m, c], of this shard: log-sum-exp, logit at the label, and what the divergence needs."""
        out = self._new(_STATISTICS[self.mode, self.weight])
        self._row_pass(
            passes.statistics_kernel, (self._tokens,), self.student, self.teacher, self.labels, out, self.shard.start,
            self.shard.width, self.student.stride(0), self._tokens,
            MODE=self.mode, WEIGHT=self.weight, NOTHING=LOG_OF_NOTHING,
        )  # fmt: skip
        if self.sparse is None:
            return out
        self._listed = self.shard.pick(self.student, self.sparse.ids).to(self.exact)
        return torch.cat([out, self._listed.t() / self.objective.temperature])

    def resolve(self, gathered: Tensor) -> Tensor:
        """All ranks' statistics [tp, m, c] -> cross-entropy and divergence (T^2 included) [2, c]. Collective (one
        all-gather) for a divergence without a chain rule."""
        ranks, m, _ = gathered.shape
        self._resolved = self._new(len(RESOLVED))
        square = self.objective.temperature**2
        passes.launch(
            passes.resolve_kernel, (triton.cdiv(self._tokens, TOKEN_BLOCK),), gathered, self._resolved, self._tokens, m,
            ranks, MODE=self.mode, WEIGHT=self.weight, SQUARE=square, BLOCK=TOKEN_BLOCK,
            **self._formula, **self._common,
        )  # fmt: skip
        if self.mode == NONE:
            self._resolved[_DIVERGENCE].zero_()
        elif self.sparse is not None:
            value, _ = self.sparse.resolve(gathered[:, 2:])
            torch.mul(value, square, out=self._resolved[_DIVERGENCE])
            self._resolved[_TERM].copy_(self.sparse.per_mass)
        elif self.weight == 0:
            self._sum_over_shards(square)
        return self._resolved[_CROSS_ENTROPY : _DIVERGENCE + 1]

    def gradient_(self, weight: Tensor) -> None:
        """Replaces the logits [c, w] by the gradient of the weighted loss; weight [c] is the loss mask."""
        objective, width, stride = self.objective, self.shard.width, self.student.stride(0)
        if width == 0:
            return
        on_divergence = objective.divergence_weight * objective.temperature  # T^2 of the loss times 1/T of d(s / T)
        passes.launch(
            passes.gradient_kernel, (self._tokens, triton.cdiv(width, GRADIENT_BLOCK)), self.student, self.teacher,
            self.labels, weight.contiguous(), self._resolved, self.shard.start, width, stride, self._tokens,
            CROSS_ENTROPY=objective.cross_entropy_weight, DIVERGENCE=on_divergence, MODE=self.mode,
            BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS, **self._scale, **self._formula,
        )  # fmt: skip
        if self.sparse is not None:
            ids, values = self._at_listed(self.sparse, weight, on_divergence)
            k = ids.shape[1]
            passes.launch(
                passes.listed_kernel, (self._tokens,), self.student, ids, values, self.shard.start, width, stride, k,
                BLOCK=triton.next_power_of_2(k),
            )  # fmt: skip

    @property
    def _tokens(self) -> int:
        return self.student.shape[0]

    def _new(self, rows: int) -> Tensor:
        return self.student.new_empty(rows, self._tokens, dtype=self.exact)

    def _sum_over_shards(self, square: float) -> None:
        """Sums of values and gradient terms over the vocabulary, for a row without a chain rule. Collective."""
        whole = self._resolved[_DIVERGENCE : _TERM + 1]
        out = whole if self.shard.size == 1 else self._new(2)
        self._row_pass(
            passes.sums_kernel, (self._tokens,), self.student, self.teacher, self._resolved, out, self.shard.width,
            self.student.stride(0), self._tokens, SQUARE=square, **self._formula,
        )  # fmt: skip
        if out is not whole:
            torch.sum(self.shard.gather(out), 0, out=whole)

    def _at_listed(self, sparse: SparseComparison, weight: Tensor, on_divergence: float) -> tuple[Tensor, Tensor]:
        """Ids [c, k], -1 where ignored, and the complete gradient there, which is rounded once.

        To add the listed part to what the kernel has rounded would lose it where both distributions agree.
        """
        lse, lse_of_tempered, factor = (
            self._resolved[row][:, None] for row in (_LSE, _LSE_OF_TEMPERED, _TERM)
        )  # fmt: skip
        on_softmax = weight[:, None] * self.objective.cross_entropy_weight
        q = (self._listed / self.objective.temperature - lse_of_tempered).exp()
        values = on_softmax * ((self._listed - lse).exp() - (sparse.ids == self.labels[:, None]).to(self.exact))
        values += weight[:, None] * on_divergence * (factor * q + sparse.at_listed)
        return sparse.ids.masked_fill(sparse.log_probs.isneginf(), -1).contiguous(), values.contiguous()


def rows_of_logits(rows: int, width: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """An uninitialised buffer [rows, width] on the device of `like`, whose rows are a multiple of 16 numbers apart."""
    stride = max(16, -(-width // 16) * 16)
    return like.new_empty(rows, stride, dtype=dtype)[:, :width]


def in_interpreter() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when Triton was first imported."""
    return not any(isinstance(function, triton.JITFunction) for function in (passes.statistics_kernel, tl.sum))
