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
from megatron_capgap.losses.comparison import Comparison, DenseComparison, NoComparison, SparseComparison
from megatron_capgap.losses.objective import DistillationObjective
from megatron_capgap.losses.teacher_outputs import TeacherLogits, TeacherOutputs, TeacherTopK, check_ids
from megatron_capgap.losses.vocab_parallel import chunk_losses_
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

    Raises:
        UserError: shapes that do not match, or a counted label or teacher's id outside the vocabulary (on a GPU a
            device assertion, since the message would require a synchronisation).
    """
    looked_at = None if objective.divergence_weight == 0 else teacher
    shard = VocabShard.of(student_head.shape[0], vocab_size, group)
    task = _Task(
        looked_at, labels, loss_mask, objective, vocab_size, shard, sequence_parallel, _chunk(chunk_tokens, labels)
    )
    return _loss(student_hidden, student_head, task)


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
) -> Loss:
    """Cross-entropy alone, for pretraining, finetuning and evaluation.

    Arguments, gradients, collectives and Raises are those of `distillation_loss`, without a teacher.
    """
    objective = ObjectiveConfig(divergence_weight=0.0, cross_entropy_weight=1.0)
    shard = VocabShard.of(head.shape[0], vocab_size, group)
    task = _Task(None, labels, loss_mask, objective, vocab_size, shard, sequence_parallel, _chunk(chunk_tokens, labels))
    return _loss(hidden, head, task)


def _chunk(given: int | None, tensor: Tensor) -> int:
    return derived.loss_chunk_tokens(tensor.is_cpu) if given is None else given


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

    def comparison(self, rows: slice, buffer: Tensor | None) -> Comparison:
        """The comparison with the teacher for one chunk; dense teacher logits are computed into `buffer` [c, w]."""
        teacher, objective, shard = self.teacher, self.objective, self.shard
        if teacher is None:
            return NoComparison()
        assert buffer is not None, "with a teacher there is a buffer"
        if isinstance(teacher, TeacherTopK):
            ids, log_probs = (self.of_chunk(x, rows) for x in (teacher.ids, teacher.log_probs))
            return SparseComparison(ids.long(), log_probs.to(buffer.dtype), teacher.tail, objective, shard)
        if isinstance(teacher, TeacherLogits):
            buffer.copy_(self.of_chunk(teacher.logits, rows)[:, : shard.width])
        else:
            whole = teacher.hidden.shape[0] == self.labels.shape[0]
            hidden = self.of_chunk(teacher.hidden, rows) if whole else self.gathered(teacher.hidden, rows)
            _project(hidden, teacher.head[: shard.width], buffer)
        if objective.temperature != 1:
            buffer.div_(objective.temperature)
        return DenseComparison(buffer, objective, shard)


class _Gradients:
    """Accumulated gradients of hidden states [n / parts, h] and LM head [v/tp, h], each only if requested.

    The head's gradient is accumulated over chunks in the dtype `exact`. It is rounded to the head's dtype once, at the
    end, unless the head has a `main_grad`, to which the backward pass adds it.
    """

    def __init__(self, hidden: Tensor, head: Tensor, task: _Task, needs_grad: tuple[bool, bool], exact: torch.dtype):
        self.task, self.real_head = task, head[: task.shard.width]
        self.head_type = exact if hasattr(head, "main_grad") else head.dtype
        self.of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_grad[0] else None
        self.of_head = torch.zeros_like(head, dtype=exact) if needs_grad[1] else None

    def add_(self, rows: slice, logits: Tensor, hidden: Tensor) -> None:
        """Adds one chunk, given the gradient of its logits [c, w] and its hidden states [c, h]."""
        logits = logits.to(hidden.dtype)
        if self.of_hidden is not None:
            if self.task.parts == 1:  # partial over the ranks until `finished`
                torch.mm(logits, self.real_head, out=self.of_hidden[rows])
            else:
                self.task.shard.reduce_rows(torch.mm(logits, self.real_head), self.of_hidden[rows])
        if self.of_head is not None:
            of_real_head = self.of_head[: self.real_head.shape[0]]
            if hidden.dtype == of_real_head.dtype:
                of_real_head.addmm_(logits.t(), hidden)
            else:
                of_real_head.add_(torch.mm(logits.t(), hidden))

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients, complete. Collective: an all-reduce of the hidden states' gradient, if it is partial."""
        if self.of_hidden is not None and self.task.parts < self.task.shard.size:
            dist.all_reduce(self.of_hidden, group=self.task.shard.group)
        return self.of_hidden, None if self.of_head is None else self.of_head.to(self.head_type)


def _chunked_forward_backward(
    hidden: Tensor, head: Tensor, task: _Task, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Returns the loss, the sums of cross-entropy and divergence [2], and the requested gradients (hidden, head)."""
    objective, shard, parts = task.objective, task.shard, task.parts
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    step = max(1, min(task.step, hidden.shape[0]))
    compared = task.teacher is not None
    buffers = [
        hidden.new_empty(parts * step, shard.width, dtype=exact) if needed else None
        for needed in (True, compared, compared and objective.temperature != 1)
    ]
    gradients = _Gradients(hidden, head, task, needs_grad, exact)
    sums = hidden.new_zeros(2, dtype=exact)
    for first in range(0, hidden.shape[0], step):
        rows = slice(first, min(first + step, hidden.shape[0]))
        chunk = task.gathered(hidden, rows)
        logits, of_teacher, spare = (x if x is None else x[: chunk.shape[0]] for x in buffers)
        assert logits is not None, "the first buffer is always needed"
        _project(chunk, head[: shard.width], logits)
        comparison = task.comparison(rows, of_teacher)
        labels, weight = task.of_chunk(task.labels, rows), task.of_chunk(task.loss_mask, rows).to(exact)
        losses = chunk_losses_(
            logits, comparison, labels, weight, objective, shard, spare=spare, with_gradient=any(needs_grad)
        )
        sums += torch.stack(losses) @ weight
        if any(needs_grad):
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
    def forward(ctx: Any, hidden: Tensor, head: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
        loss_sum, sums, gradients = _chunked_forward_backward(hidden, head, task, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.main_grad, ctx.head_type = getattr(head, "main_grad", None), head.dtype
        ctx.mark_non_differentiable(sums)
        return loss_sum, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_hidden, of_head = ctx.saved_tensors
        if not (loss_gradient.is_cpu and loss_gradient == 1):  # on a GPU `==` would synchronise: multiply
            # In place: these gradients are used once. A second backward detects the change and raises.
            of_hidden, of_head = (x if x is None else x.mul_(loss_gradient) for x in (of_hidden, of_head))
        if of_head is not None and ctx.main_grad is not None:
            ctx.main_grad.add_(of_head)
            # DDP's hook requires a gradient and adds it to main_grad; with tied embeddings it holds the embedding's.
            of_head = of_head.zero_().to(ctx.head_type)
        return of_hidden, of_head, None


def _loss(hidden: Tensor, head: Tensor, task: _Task) -> Loss:
    _check(hidden, head, task)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        loss_sum, sums = _GradientInForward.apply(hidden, head, task)
    else:
        with torch.no_grad():
            loss_sum, sums, _ = _chunked_forward_backward(hidden, head, task, (False, False))
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
