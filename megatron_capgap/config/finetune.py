"""The section of the stage finetune; `schema` puts it beside the others."""

from dataclasses import dataclass
from typing import Literal

from megatron_capgap.config.types import STRICT, NonNegativeFloat, Positive


@dataclass(frozen=True)
class FinetuneConfig:
    """How conversations are read and learned; their files are data.train and data.valid."""

    __pydantic_config__ = STRICT

    template: Literal["tokenizer", "default"] = "tokenizer"
    """How a conversation is written down: tokenizer is the chat template that came with data.tokenizer, default is
    [|User|]...[|Assistant|]... with an end of text behind every turn. Checkpoints keep it, an export takes it along."""
    packed: bool = True
    """Several conversations share a row of data.sequence_length tokens, none of which sees another; false gives each a
    row of its own."""
    epochs: Positive = 3
    """How often every conversation is read; train.steps, where given, decides in its place."""
    neftune_alpha: NonNegativeFloat = 0.0
    """Noise on the input embeddings in training: uniform in [-1, 1] * alpha / sqrt(length * hidden), the length that of
    the conversation; 0 means none."""
    patience: Positive | None = None
    """Evaluations on data.valid in a row without a lower loss that end the run; the checkpoint with the lowest is kept,
    and is the one that the run directory stands for. null means that the last one is."""
