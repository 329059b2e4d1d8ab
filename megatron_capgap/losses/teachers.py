"""The three forms in which a teacher may arrive. None of them ever gets a gradient, and none is written."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from megatron_capgap.config.errors import UserError

Tail = Literal["drop", "renormalise", "ghost"]


@dataclass(frozen=True)
class TeacherHidden:
    """Final hidden states (after the final norm) and the teacher's LM head; its logits are made chunk by
    chunk.

    The head's shard must have as many rows as the student's: the same vocabulary, cut at the same places. The
    widths of the two models may differ.
    """

    hidden: Tensor
    """[n, h_teacher] replicated, or with sequence parallelism [n/tp, h_teacher], this rank's tokens."""
    head: Tensor
    """[v/tp, h_teacher] local shard of the LM head."""

    def check(self, tokens: int, shards: int, padded_width: int) -> None:
        """Raises UserError unless the shapes fit `tokens` = n, tp = `shards` and the student's v/tp =
        `padded_width`."""
        if self.head.shape[0] != padded_width:
            raise UserError(
                f"teacher LM head: {self.head.shape[0]} rows on this rank, but the student's has "
                f"{padded_width}; both need the same vocabulary, padded alike"
            )
        if self.hidden.shape[-1] != self.head.shape[1]:
            raise UserError(
                f"teacher hidden states are {self.hidden.shape[-1]} wide, its LM head {self.head.shape[1]}"
            )
        if self.hidden.shape[0] * shards != tokens and self.hidden.shape[0] != tokens:
            raise UserError(
                f"teacher hidden states: {self.hidden.shape[0]} tokens, but there are {tokens} labels"
            )


@dataclass(frozen=True)
class TeacherLogits:
    """Logits that somebody else has made."""

    logits: Tensor
    """[n, v/tp] local shard: all tokens (also with sequence parallelism), columns cut as the student's LM
    head is."""

    def check(self, tokens: int, shards: int, padded_width: int) -> None:
        """Raises UserError unless the logits are [n, v/tp]."""
        if tuple(self.logits.shape) != (tokens, padded_width):
            raise UserError(
                f"teacher logits: shape {tuple(self.logits.shape)}, but {tokens} labels and a student head "
                f"of {padded_width} rows on this rank need {(tokens, padded_width)}"
            )


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's k most probable tokens at each position, replicated on the tensor-parallel ranks."""

    ids: Tensor
    """[n, k] integer ids within the whole vocabulary, distinct at each position."""
    log_probs: Tensor
    """[n, k] log-probabilities, at the temperature of the objective (they are taken as they are); -inf fills
    up a shorter list."""
    tail: Tail = "drop"
    """What is assumed of the tokens that are not listed.
    drop: the teacher gives them nothing, and its listed probabilities may sum to less than 1;
    renormalise: nothing, and both distributions are scaled to sum to 1 over the listed tokens;
    ghost: all of them together are one more outcome, with the remaining mass on either side."""

    def check(self, tokens: int, shards: int, padded_width: int) -> None:
        """Raises UserError unless ids and log_probs are [n, k] and the tail is known."""
        if self.ids.shape != self.log_probs.shape or self.ids.dim() != 2 or self.ids.shape[0] != tokens:
            raise UserError(
                f"teacher top-k: ids {tuple(self.ids.shape)} and log_probs {tuple(self.log_probs.shape)} "
                f"must both be [{tokens}, k] for {tokens} labels"
            )
        if self.tail not in get_args(Tail):
            raise UserError(f"teacher top-k: tail {self.tail!r} is unknown; use {', '.join(get_args(Tail))}")


Teacher = TeacherHidden | TeacherLogits | TeacherTopK
