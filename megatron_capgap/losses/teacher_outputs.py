"""The three forms in which a teacher may arrive. None of them ever gets a gradient, and none is written."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_capgap.common.errors import UserError

Tail = Literal["drop", "renormalise", "ghost"]


@dataclass(frozen=True)
class TeacherHidden:
    """Final hidden states, after the final norm, and the teacher's LM head; logits are made chunk by chunk.

    Both heads must be cut at the same places: their shards have equally many rows, or each holds the whole vocabulary,
    which may then be padded differently. The widths of the two models may differ.
    """

    hidden: Tensor
    """[n, h_teacher] replicated, or with sequence parallelism [n/tp, h_teacher], this rank's tokens."""
    head: Tensor
    """[v/tp, h_teacher] local shard of the LM head."""

    def check(self, tokens: int, parts: int, padded_width: int, vocab_size: int) -> None:
        """Raises UserError unless the shapes fit n tokens, cut into parts, and the student's v/tp = padded_width."""
        if not _check_same_shard(self.head.shape[0], padded_width, vocab_size):
            raise UserError(
                f"teacher LM head: {self.head.shape[0]} rows on this rank, but the student's has {padded_width}; "
                f"both must cut the vocabulary of {vocab_size} at the same places"
            )
        if self.hidden.shape[-1] != self.head.shape[1]:
            raise UserError(f"teacher hidden states are {self.hidden.shape[-1]} wide, its LM head {self.head.shape[1]}")
        if self.hidden.shape[0] * parts != tokens and self.hidden.shape[0] != tokens:
            raise UserError(f"teacher hidden states: {self.hidden.shape[0]} tokens, but there are {tokens} labels")


@dataclass(frozen=True)
class TeacherLogits:
    """Logits that somebody else has made."""

    logits: Tensor
    """[n, v/tp] local shard: all tokens, with sequence parallelism too; columns cut as the student's LM head is."""

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
    """[n, k] ids within the whole vocabulary, distinct at each position; any number where log_probs is -inf."""
    log_probs: Tensor
    """[n, k] log-probabilities at the temperature of the objective (taken as they are); -inf fills up a short list."""
    tail: Tail = "drop"
    """What is assumed of the tokens that are not listed.
    drop: the teacher gives them nothing, and its listed probabilities may sum to less than 1;
    renormalise: nothing, and both distributions are scaled to sum to 1 over the listed tokens;
    ghost: all of them together are one more outcome, with the remaining mass on either side."""

    def check(self, tokens: int, parts: int, padded_width: int, vocab_size: int) -> None:
        """Raises UserError unless ids and log_probs are [n, k], the ids real and the tail known."""
        if self.ids.shape != self.log_probs.shape or self.ids.dim() != 2 or self.ids.shape[0] != tokens:
            raise UserError(
                f"teacher top-k: ids {tuple(self.ids.shape)} and log_probs {tuple(self.log_probs.shape)} "
                f"must both be [{tokens}, k] for {tokens} labels"
            )
        if self.tail not in get_args(Tail):
            raise UserError(f"teacher top-k: tail {self.tail!r} is unknown; use {', '.join(get_args(Tail))}")
        check_ids("teacher top-k ids", self.ids, ~self.log_probs.isneginf(), vocab_size, "fill up with -inf")


TeacherOutputs = TeacherHidden | TeacherLogits | TeacherTopK


def _check_same_shard(rows: int, student_rows: int, vocab_size: int) -> bool:
    """Whether the real columns of two shards are the same ones."""
    return rows == student_rows or min(rows, student_rows) >= vocab_size


def check_ids(what: str, ids: Tensor, counted: Tensor, vocab_size: int, way_out: str) -> None:
    """Raises UserError where a counted id lies outside the vocabulary.

    On a GPU that is an asynchronous device assertion: reading one number back would make the host wait for the device
    in every micro-batch.
    """
    wrong = counted & ((ids < 0) | (ids >= vocab_size))
    if not ids.is_cpu:
        torch._assert_async(~wrong.any(), f"{what}: an id lies outside the vocabulary of {vocab_size}")
    elif wrong.any():
        found = ids[wrong][0].item()
        raise UserError(f"{what}: {found} lies outside the vocabulary of {vocab_size}; correct it or {way_out}")
