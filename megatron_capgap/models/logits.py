"""Bytes of logits and of the loss on one rank, by arithmetic alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.schema import Config, Layout, ModelShape, Precision
from megatron_capgap.models import size


@dataclass(frozen=True)
class Logits:
    """One model's logits on one rank: fp32 on a CPU; on a GPU, whose Triton kernels work on the matrix products'
    output, of the compute type."""

    shape: ModelShape
    layout: Layout
    precision: Precision
    on_cpu: bool

    @property
    def of_token(self) -> int:
        """Bytes of one token's logits."""
        width = size.padded_vocab(self.shape.vocab, self.layout.tensor) // self.layout.tensor
        return width * (4 if self.on_cpu else derived.BYTES[self.precision.compute])

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk of the loss."""
        return derived.loss_chunk_tokens(self.on_cpu, self.of_token)

    def of_chunks(self, tokens: int, together: int = 1) -> int:
        """Bytes of the chunks that exist at a time, `together` of them, of `tokens` tokens in all."""
        return min(together * self.chunk_tokens, tokens) * self.of_token


def of_loss(config: Config, student: ModelShape, teacher: ModelShape | None, tokens: int, on_cpu: bool) -> int:
    """Bytes of the live logits, and of the gradients of hidden states and LM head until the backward pass.

    Logits: the student's, the teacher's, and on a CPU a second copy of the student's if the temperature is not 1. On a
    GPU the head's gradient is in DDP's buffer, and autograd gets a stand-in when the logits are freed.
    """
    layout, objective, precision = config.student.layout, config.objective, derived.student_precision(config)
    buffers = together = 1
    if teacher is not None and objective.divergence_weight > 0:
        together = derived.loss_chunks_together(objective.divergence, layout.tensor)
        buffers = 3 if on_cpu and objective.temperature != 1 else 2
    logits = Logits(student, layout, precision, on_cpu)
    alive, head = buffers * logits.of_chunks(tokens, together), logits.of_token * student.hidden
    of_hidden = tokens * student.hidden * derived.BYTES[precision.compute]
    return of_hidden + (alive + head if on_cpu else max(alive, head))
