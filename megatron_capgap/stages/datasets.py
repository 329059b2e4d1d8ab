"""What a run reads: indexed datasets, or conversations where the stage is about them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config.schema import Config
from megatron_capgap.data import pretrain
from megatron_capgap.data.batch import Samples
from megatron_capgap.data.conversation_dataset import Conversations
from megatron_capgap.stages.resolve import ResolvedConfig, missing_data


def cache_dir(config: Config) -> Path:
    """Where the sample indices of the datasets, and encoded conversations, are kept."""
    return Path(config.run_dir) / "data_cache"


def build_indices(resolved: ResolvedConfig) -> list[str]:
    """Checks the data and indexes or encodes it, once for all ranks. Rank 0 only.

    Returns:
        What the reader must be told.

    Raises:
        UserError: the data are not there, damaged, or not what the stage reads.
    """
    config = resolved.config
    if problems := missing_data(resolved.loaded, resolved.stage):
        raise ConfigError(problems)
    if (conversations := _conversations(resolved)) is not None:
        return conversations.build(resolved.student.vocab)
    pretrain.build_indices(config.data, resolved.student.vocab, config.seed, cache_dir(config))
    return []


def open_training(resolved: ResolvedConfig) -> Samples:
    """The endless samples of data.train; sample k is the same in any layout."""
    config = resolved.config
    if (conversations := _conversations(resolved)) is not None:
        return conversations.open_training(config.seed, packed=resolved.finetune.packed)
    return pretrain.open_training(config.data, config.seed, cache_dir(config))


def open_validation(resolved: ResolvedConfig) -> Samples | None:
    """Every sample of data.valid once; None where it names none."""
    config = resolved.config
    if not config.data.valid:
        return None
    if (conversations := _conversations(resolved)) is not None:
        return conversations.open_validation(packed=resolved.finetune.packed)
    return pretrain.open_validation(config.data, cache_dir(config))


def steps(resolved: ResolvedConfig) -> int | None:
    """train.steps, or in finetune what its epochs come to: each row is read as often, and a few once more, to fill the
    last global batch."""
    config = resolved.config
    if resolved.stage != "finetune" or config.train.steps is not None:
        return config.train.steps
    return math.ceil(resolved.finetune.epochs * len(open_training(resolved)) / resolved.global_batch)


def with_steps(resolved: ResolvedConfig, count: int | None) -> ResolvedConfig:
    """The same run, with so many steps."""
    config = replace(resolved.config, train=replace(resolved.config.train, steps=count))
    return replace(resolved, loaded=replace(resolved.loaded, config=config))


def _conversations(resolved: ResolvedConfig) -> Conversations | None:
    if resolved.template is None:
        return None
    data = resolved.config.data
    if resolved.stage == "evaluate":
        data = replace(data, train=())
    return Conversations(data, resolved.tokenizer, resolved.template, cache_dir(resolved.config))
