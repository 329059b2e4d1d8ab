"""Configuration section finetune."""

from dataclasses import dataclass
from typing import Literal

from megatron_capgap.config.types import STRICT, NonNegativeFloat, Positive


@dataclass(frozen=True)
class FinetuneConfig:
    """Training on conversations, which are read from data.train and data.valid."""

    __pydantic_config__ = STRICT

    template: Literal["tokenizer", "default"] = "tokenizer"
    """Chat template. tokenizer: the one of data.tokenizer; default: [|User|]...[|Assistant|]..., with an end-of-text
    token after every turn. Checkpoints and exports include the template."""
    packed: bool = True
    """true: pack several conversations into one row of data.sequence_length tokens, with attention restricted to each
    conversation; false: one conversation per row."""
    epochs: Positive = 3
    """Passes over data.train; ignored if train.steps is set."""
    neftune_alpha: NonNegativeFloat = 0.0
    """NEFTune: noise added to the input embeddings in training, uniform in [-1, 1] * alpha / sqrt(length * hidden),
    where length is that of the conversation; 0: none."""
    patience: Positive | None = None
    """Early stopping: end the run after this many consecutive evaluations on data.valid without a lower loss. The
    checkpoint with the lowest loss is kept, and is the one that is read when a configuration names the run directory.
    Requires train.eval_every > 0. null: no early stopping, the latest checkpoint is read."""
