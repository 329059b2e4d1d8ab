"""The three forms of teacher outputs that `distillation_loss` accepts. They get no gradient and are never modified."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_capgap.common.errors import UserError

Tail = Literal["drop", "renormalise", "ghost"]


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher's hidden states after the final norm, and its LM head; the loss computes logits chunk by chunk.

    Teacher and student heads must be sharded at the same vocabulary boundaries: either their shards have the same
    number of rows, or each shard holds the whole vocabulary (then the padding may differ). The hidden sizes of the two
    models may differ.
    """

    hidden: Tensor
    """[n, h_teacher] replicated, or with sequence parallelism [n/tp, h_teacher], the shard of this rank's tokens."""
    head: Tensor
    """[v/tp, h_teacher] local shard of the LM head, padding included."""

    def check(self, tokens: int, parts: int, padded_width: int, vocab_size: int) -> None:
        """Raises UserError unless the shapes match n tokens in `parts` shards and the student's v/tp = padded_width."""
        if not _check_same_shard(self.head.shape[0], padded_width, vocab_size):
            raise UserError(
                f"teacher LM head: {self.head.shape[0]} rows on this rank, but the student's has {padded_width}; "
                f"both must shard the vocabulary of {vocab_size} at the same boundaries"
            )
        if self.hidden.shape[-1] != self.head.shape[1]:
            raise UserError(f"teacher hidden states are {self.hidden.shape[-1]} wide, its LM head {self.head.shape[1]}")
        if self.hidden.shape[0] * parts != tokens and self.hidden.shape[0] != tokens:
            raise UserError(f"teacher hidden states: {self.hidden.shape[0]} tokens, but there are {tokens} labels")


@dataclass(frozen=True)
class TeacherLogits:
    """Precomputed teacher logits."""

    logits: Tensor
    """[n, v/tp] local shard: all n tokens, also with sequence parallelism; columns sharded like the student's LM head.
    Not divided by the temperature: the loss does that."""

    def check(self, tokens: int, parts: int, padded_width: int, vocab_size: int) -> None:
        """Raises UserError unless the logits are [n, v/tp]."""
        shape = tuple(self.logits.shape)
        if len(shape) != 2 or shape[0] != tokens or not _check_same_shard(shape[1], padded_width, vocab_size):
            raise UserError(
                f"teacher logits: shape {shape}, but {tokens} labels and a student head of {padded_width} rows on "
                f"this rank, for a vocabulary of {vocab_size}, need {(tokens, padded_width)}"
            )


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's k most probable tokens at each position, replicated on the tensor-parallel ranks."""

    ids: Tensor
    """[n, k] token ids in the whole vocabulary, distinct at each position; ignored where log_probs is -inf."""
    log_probs: Tensor
    """[n, k] log-probabilities at the objective's temperature (used as given); -inf pads a position with fewer than k
    tokens."""
    tail: Tail = "drop"
    """Treatment of the tokens that are not listed.
    drop: the teacher assigns them probability 0; its listed probabilities may sum to less than 1;
    renormalise: probability 0, and both distributions are rescaled to sum to 1 over the listed tokens;
    ghost: they form one additional outcome that holds the remaining probability mass of each model."""

    def check(self, tokens: int, parts: int, padded_width: int, vocab_size: int) -> None:
        """Raises UserError unless ids and log_probs are [n, k], the ids lie in the vocabulary and `tail` is valid."""
        if self.ids.shape != self.log_probs.shape or self.ids.dim() != 2 or self.ids.shape[0] != tokens:
            raise UserError(
                f"teacher top-k: ids {tuple(self.ids.shape)} and log_probs {tuple(self.log_probs.shape)} "
                f"must both be [{tokens}, k] for {tokens} labels"
            )
        if self.tail not in get_args(Tail):
            raise UserError(f"teacher top-k: tail {self.tail!r} is unknown; valid values: {', '.join(get_args(Tail))}")
        check_ids("teacher top-k ids", self.ids, ~self.log_probs.isneginf(), vocab_size, "pad with -inf")


TeacherOutputs = TeacherHidden | TeacherLogits | TeacherTopK


def _check_same_shard(rows: int, student_rows: int, vocab_size: int) -> bool:
    """Whether two shards hold the same real (not padded) columns."""
    return rows == student_rows or min(rows, student_rows) >= vocab_size


def check_ids(what: str, ids: Tensor, counted: Tensor, vocab_size: int, way_out: str) -> None:
    """Raises UserError if a counted id is outside the vocabulary.

    On a GPU this is an asynchronous device assertion instead: reading a value back would synchronise host and device
    in every micro-batch.

    Args:
        what: name of the ids in the message.
        ids: token ids, any shape.
        counted: bool, same shape; False where an id is ignored.
        vocab_size: number of real columns of the vocabulary.
        way_out: the alternative to a correction, as the message gives it.
    """
    wrong = counted & ((ids < 0) | (ids >= vocab_size))
    if not ids.is_cpu:
        torch._assert_async(~wrong.any(), f"{what}: an id is outside the vocabulary of {vocab_size}")
    elif wrong.any():
        found = ids[wrong][0].item()
        raise UserError(f"{what}: {found} is outside the vocabulary of {vocab_size}; correct it or {way_out}")
