"""Fused LM head and loss: logits, losses and gradients are computed chunk by chunk in the forward pass.

For each chunk of tokens the forward pass computes the logits, compares them with the teacher's, replaces them by their
gradient and multiplies it into the gradients of hidden states and LM head; the next chunk reuses the buffers. Memory
therefore grows with the chunk, not with the number of tokens, and the backward pass only scales the stored gradients.

Collectives over the tensor-parallel group: one all-gather of per-token statistics per chunk, and one all-reduce per
call for the hidden states' gradient. With sequence parallelism each chunk all-gathers its hidden states and
reduce-scatters their gradient instead. The backward pass has no collectives. Divergences without a chain rule need a
second all-gather that depends on the first; they process two chunks at a time, and each all-gather carries both.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.backend import Kernels, uses_triton
from megatron_capgap.losses.comparison import Comparison, DenseComparison, NoComparison, SparseComparison
from megatron_capgap.losses.eager import EagerPasses, Passes
from megatron_capgap.losses.gradients import Gradients, dummy_gradient
from megatron_capgap.losses.objective import DistillationObjective
from megatron_capgap.losses.teacher_outputs import (
    TeacherHidden,
    TeacherLogits,
    TeacherOutputs,
    TeacherTopK,
    check_ids,
)
from megatron_capgap.losses.vocab_shard import VocabShard


class Loss(NamedTuple):
    """Result of a loss function; identical on all tensor-parallel ranks.

    The mean loss is loss_sum / num_tokens, with both summed over all micro-batches and data-parallel ranks.
    """

    loss_sum: Tensor
    """Scalar: objective summed over tokens, each times its loss mask; fp32 (float64 for float64 inputs)."""
    num_tokens: Tensor
    """Scalar, fp32: sum of the loss mask."""
    report: dict[str, Tensor]
    """Detached scalars, masked sums without the objective's weights: "cross_entropy" and, if a teacher is used,
    "divergence" (T^2 included)."""


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: TeacherOutputs,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    objective: DistillationObjective,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
    into_main_grad: bool = False,
) -> Loss:
    """Divergence from the teacher plus cross-entropy, summed over the valid tokens of a micro-batch.

    `loss_sum.backward()` computes the gradients of student_hidden (complete, not partial over tensor-parallel ranks)
    and of student_head (of the local shard; if the head has the `main_grad` of Megatron's DDP, the gradient is added
    there without rounding). It can be called once. Under torch.no_grad(), or if neither tensor requires a gradient,
    no gradient is computed.

    Collective over `group`: all its ranks must call it with the same number of tokens. One all-gather per chunk (two
    for a divergence without a chain rule) and one all-reduce per call; with sequence parallelism an all-gather and a
    reduce-scatter of [c, h] per chunk instead of the all-reduce.

    Args:
        student_hidden: [n, h] replicated, or with sequence_parallel [n/tp, h]: rank r holds the tokens r * n/tp + i,
            as in Megatron. After the final norm.
        student_head: [v/tp, h] local shard of the LM head, padding included.
        teacher: hidden states and LM head, logits, or top-k log-probabilities.
        labels: [n] int64 token ids, always of all n tokens.
        loss_mask: [n] weight of each token; where it is 0, the token does not count and its label is ignored.
        objective: divergence, temperature and weights.
        vocab_size: number of real columns of the vocabulary; further rows of the heads are padding, have probability
            0 and get no gradient.
        group: the tensor-parallel group; None for one rank.
        sequence_parallel: whether hidden states are sharded along the sequence.
        chunk_tokens: tokens per chunk, whose logits exist at the same time. Larger chunks make larger matrix products,
            smaller ones save memory. None selects `config.derived.loss_chunk_tokens`. Doubled over several ranks for
            a divergence without a chain rule, unless the teacher is sparse (top-k).
        kernels: auto: Triton kernels on a GPU if Triton is installed, otherwise eager; eager: plain torch; triton: on
            a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
        into_main_grad: whether the head has a `main_grad` to which the forward pass may add the head's gradient, chunk
            by chunk and without a buffer of its own. `loss_sum` must then be backpropagated with a gradient of 1, as
            Megatron's schedules do, or a RuntimeError is raised (on a GPU a device assertion).

    Raises:
        UserError: shapes that do not match, kernels that cannot run here, or a counted label or teacher's id outside
            the vocabulary (on a GPU a device assertion, since the message would require a synchronisation).
    """
    looked_at = None if objective.divergence_weight == 0 else teacher
    shard = VocabShard.of(student_head.shape[0], vocab_size, group)
    triton = uses_triton(kernels, labels)
    chunk = _chunk(chunk_tokens, labels, student_head, triton)
    task = _Task(looked_at, labels, loss_mask, objective, vocab_size, shard, sequence_parallel, chunk, triton)
    return _loss(student_hidden, student_head, task, into_main_grad)


def language_model_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
    into_main_grad: bool = False,
) -> Loss:
    """Cross-entropy alone, for pretraining, finetuning and evaluation.

    Arguments, gradients, collectives and Raises are those of `distillation_loss`, without a teacher.
    """
    objective = ObjectiveConfig(divergence_weight=0.0, cross_entropy_weight=1.0)
    shard = VocabShard.of(head.shape[0], vocab_size, group)
    triton = uses_triton(kernels, labels)
    chunk = _chunk(chunk_tokens, labels, head, triton)
    task = _Task(None, labels, loss_mask, objective, vocab_size, shard, sequence_parallel, chunk, triton)
    return _loss(hidden, head, task, into_main_grad)


def _chunk(given: int | None, labels: Tensor, head: Tensor, triton: bool) -> int:
    if given is not None:
        return given
    return derived.loss_chunk_tokens(labels.is_cpu, head.shape[0] * head.element_size() if triton else None)


@dataclass(frozen=True)
class _Task:
    """The arguments of one call, except the two tensors that may require a gradient."""

    teacher: TeacherOutputs | None
    labels: Tensor
    loss_mask: Tensor
    objective: ObjectiveConfig
    vocab_size: int
    shard: VocabShard
    sequence_parallel: bool
    chunk_tokens: int
    triton: bool

    @property
    def parts(self) -> int:
        """Number of ranks over which the tokens are sharded."""
        return self.shard.size if self.sequence_parallel else 1

    @property
    def step(self) -> int:
        """Tokens of each part that are processed at a time."""
        dense = self.teacher is not None and not isinstance(self.teacher, TeacherTopK)
        together = derived.loss_chunks_together(self.objective.divergence, self.shard.size) if dense else 1
        return max(1, together * self.chunk_tokens // self.parts)

    def of_chunk(self, everything: Tensor, rows: slice) -> Tensor:
        """[n, ...] -> the chunk's tokens [c, ...]: `rows` of every rank's part, in rank order."""
        return everything.unflatten(0, (self.parts, -1))[:, rows].flatten(0, 1)

    def gathered(self, part: Tensor, rows: slice) -> Tensor:
        """[n / parts, h] on each rank -> the chunk's tokens [c, h]. Collective (all-gather) if parts > 1."""
        return part[rows] if self.parts == 1 else self.shard.gather_rows(part[rows])

    def passes(self, rows: slice, logits: Tensor, of_teacher: Tensor | None, spare: Tensor | None) -> Passes:
        """The passes over one chunk, given its student logits [c, w]; dense teacher logits are computed into
        `of_teacher` [c, w]."""
        labels, teacher, objective, shard = self.of_chunk(self.labels, rows), self.teacher, self.objective, self.shard
        sparse = self._sparse(rows, _exact(logits)) if isinstance(teacher, TeacherTopK) else None
        dense = teacher is not None and sparse is None
        if dense:
            assert of_teacher is not None, "there is a buffer for dense logits"
            self._project_teacher(rows, of_teacher)
        if self.triton:
            from megatron_capgap.losses.kernels import TritonPasses

            return TritonPasses(logits, of_teacher if dense else sparse, labels, objective, shard)
        comparison: Comparison = sparse or NoComparison()
        if dense and of_teacher is not None:
            if objective.temperature != 1:
                of_teacher.div_(objective.temperature)
            comparison = DenseComparison(of_teacher, objective, shard)
        return EagerPasses(logits, comparison, labels, objective, shard, spare)

    def buffers(self, hidden: Tensor, rows: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """For chunks of at most `rows` tokens: student logits, dense teacher logits, and with eager passes and a
        temperature a second copy of the student's, [rows, w] each.

        The Triton kernels work on the logits as the matrix products write them, the eager passes in fp32 or float64.
        """
        dense = isinstance(self.teacher, TeacherHidden | TeacherLogits)
        width, exact = self.shard.width, _exact(hidden)
        if not self.triton:
            second = self.teacher is not None and self.objective.temperature != 1
            first, of_teacher, spare = (
                hidden.new_empty(rows, width, dtype=exact) if needed else None for needed in (True, dense, second)
            )
            assert first is not None
            return first, of_teacher, spare
        from megatron_capgap.losses.kernels import rows_of_logits

        teacher_type = None
        if isinstance(self.teacher, TeacherHidden | TeacherLogits):
            teacher_type = (
                self.teacher.hidden if isinstance(self.teacher, TeacherHidden) else self.teacher.logits
            ).dtype
        of_teacher = None if teacher_type is None else rows_of_logits(rows, width, teacher_type, hidden)
        return rows_of_logits(rows, width, hidden.dtype, hidden), of_teacher, None

    def _project_teacher(self, rows: slice, out: Tensor) -> None:
        """The teacher's logits of the chunk into `out` [c, w]."""
        teacher = self.teacher
        if isinstance(teacher, TeacherLogits):
            out.copy_(self.of_chunk(teacher.logits, rows)[:, : self.shard.width])
        elif isinstance(teacher, TeacherHidden):
            whole = teacher.hidden.shape[0] == self.labels.shape[0]
            hidden = self.of_chunk(teacher.hidden, rows) if whole else self.gathered(teacher.hidden, rows)
            _project(hidden, teacher.head[: self.shard.width], out)

    def _sparse(self, rows: slice, exact: torch.dtype) -> SparseComparison:
        teacher = self.teacher
        assert isinstance(teacher, TeacherTopK)
        ids, log_probs = (self.of_chunk(x, rows) for x in (teacher.ids, teacher.log_probs))
        return SparseComparison(ids.long(), log_probs.to(exact), teacher.tail, self.objective, self.shard)


def _exact(tensor: Tensor) -> torch.dtype:
    """The dtype of losses, sums and accumulated gradients."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunked_forward_backward(
    hidden: Tensor, head: Tensor, task: _Task, needs_grad: tuple[bool, bool], into_main_grad: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Returns the loss, the sums of cross-entropy and divergence [2], and the requested gradients (hidden, head)."""
    objective, shard, parts, exact = task.objective, task.shard, task.parts, _exact(hidden)
    step = max(1, min(task.step, hidden.shape[0]))
    buffers = task.buffers(hidden, parts * step)
    gradients = Gradients(hidden, head, shard, parts, needs_grad, exact, into_main_grad=into_main_grad)
    sums = hidden.new_zeros(2, dtype=exact)
    for first in range(0, hidden.shape[0], step):
        rows = slice(first, min(first + step, hidden.shape[0]))
        chunk = task.gathered(hidden, rows)
        logits, of_teacher, spare = (x if x is None else x[: chunk.shape[0]] for x in buffers)
        assert logits is not None, "the first buffer is always needed"
        _project(chunk, head[: shard.width], logits)
        passes = task.passes(rows, logits, of_teacher, spare)
        weight = task.of_chunk(task.loss_mask, rows).to(exact)
        losses = passes.resolve(shard.gather(passes.statistics()))
        sums += losses @ weight
        if any(needs_grad):
            passes.gradient_(weight)
            gradients.add_(rows, logits, chunk)
    loss_sum = objective.cross_entropy_weight * sums[0] + objective.divergence_weight * sums[1]
    return loss_sum, sums, gradients.finished()


def _project(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """out [c, w] = hidden [c, h] @ head [w, h]^T, multiplied in the dtype of the inputs."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.t(), out=out)
    else:
        out.copy_(torch.mm(hidden, head.t()))


class _GradientInForward(torch.autograd.Function):
    """The loop over chunks as one autograd node: forward computes the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, task: _Task, into_main_grad: bool) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[:2]
        loss_sum, sums, gradients = _chunked_forward_backward(hidden, head, task, needs_grad, into_main_grad)
        ctx.save_for_backward(*gradients)
        ctx.main_grad, ctx.head_type = getattr(head, "main_grad", None), head.dtype
        ctx.added = head if into_main_grad and needs_grad[1] else None
        ctx.mark_non_differentiable(sums)
        return loss_sum, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_hidden, of_head = ctx.saved_tensors
        if ctx.added is not None:
            _assert_one(loss_gradient)
            return of_hidden, dummy_gradient(ctx.added), None, None
        if not (loss_gradient.is_cpu and loss_gradient == 1):  # on a GPU `==` would synchronise: multiply
            # In place: these gradients are used once. A second backward detects the change and raises.
            of_hidden, of_head = (x if x is None else x.mul_(loss_gradient) for x in (of_hidden, of_head))
        if of_head is not None and ctx.main_grad is not None:
            ctx.main_grad.add_(of_head)
            # DDP's hook requires a gradient and adds it to main_grad; with tied embeddings it holds the embedding's.
            of_head = of_head.zero_().to(ctx.head_type)
        return of_hidden, of_head, None, None


def _assert_one(loss_gradient: Tensor) -> None:
    """Raises RuntimeError unless the incoming gradient is 1; on a GPU an asynchronous device assertion."""
    message = "into_main_grad: the head's gradient is already added, so that the loss must have a gradient of 1"
    torch._assert_async(loss_gradient == 1, message)


def _loss(hidden: Tensor, head: Tensor, task: _Task, into_main_grad: bool) -> Loss:
    _check(hidden, head, task)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        if into_main_grad and head.requires_grad and not hasattr(head, "main_grad"):
            raise UserError(
                "into_main_grad: the LM head has no main_grad; wrap the model in Megatron's DDP or unset it"
            )
        loss_sum, sums = _GradientInForward.apply(hidden, head, task, into_main_grad)
    else:
        with torch.no_grad():
            loss_sum, sums, _ = _chunked_forward_backward(hidden, head, task, (False, False), False)
    report = {"cross_entropy": sums[0]}
    if task.teacher is not None:
        report["divergence"] = sums[1]
    return Loss(loss_sum, task.loss_mask.sum(dtype=torch.float32), report)


def _check(hidden: Tensor, head: Tensor, task: _Task) -> None:
    """Raises UserError if shapes do not match or a counted label is outside the vocabulary."""
    labels, mask, parts = task.labels, task.loss_mask, task.parts
    if hidden.shape[-1] != head.shape[1]:
        raise UserError(f"student hidden states are {hidden.shape[-1]} wide, but its LM head is {head.shape[1]} wide")
    if hidden.dim() != 2 or hidden.shape[0] * parts != labels.shape[0] or labels.shape != mask.shape:
        raise UserError(
            f"student hidden states {tuple(hidden.shape)} over {parts} sequence shard(s) need labels and mask "
            f"of [{hidden.shape[0] * parts}], not {tuple(labels.shape)} and {tuple(mask.shape)}"
        )
    if task.chunk_tokens < 1:
        raise UserError(f"chunk_tokens: {task.chunk_tokens} must be at least 1")
    check_ids("labels", labels, mask != 0, task.vocab_size, "set its loss mask to 0")
    if task.teacher is not None:
        task.teacher.check(labels.shape[0], parts, head.shape[0], task.vocab_size)
