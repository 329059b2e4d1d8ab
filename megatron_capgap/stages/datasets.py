"""What a run reads: indexed datasets, or conversations where the stage is about them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config.schema import Config
from megatron_capgap.data import pretrain
from megatron_capgap.data.batch import Samples
from megatron_capgap.data.conversation_dataset import Conversations
from megatron_capgap.stages.plan import RunPlan
from megatron_capgap.stages.resolve import missing_data

Plan = TypeVar("Plan", bound=RunPlan)


def cache_dir(config: Config) -> Path:
    """Where the sample indices of the datasets, and encoded conversations, are kept."""
    return Path(config.run_dir) / "data_cache"


def build_indices(plan: RunPlan) -> list[str]:
    """Checks the data and indexes or encodes it, once for all ranks. Rank 0 only.

    Returns:
        What the reader must be told.

    Raises:
        UserError: the data are not there, damaged, or not what the stage reads.
    """
    config = plan.config
    if problems := missing_data(plan.loaded, plan.stage):
        raise ConfigError(problems)
    if (conversations := _conversations(plan)) is not None:
        return conversations.build(plan.student.vocab)
    pretrain.build_indices(config.data, plan.student.vocab, config.seed, cache_dir(config))
    return []


def open_training(plan: RunPlan) -> Samples:
    """The endless samples of data.train; sample k is the same in any layout."""
    config = plan.config
    if (conversations := _conversations(plan)) is not None:
        return conversations.open_training(config.seed, packed=plan.finetune.packed)
    return pretrain.open_training(config.data, config.seed, cache_dir(config))


def open_validation(plan: RunPlan) -> Samples | None:
    """Every sample of data.valid once; None where it names none."""
    config = plan.config
    if not config.data.valid:
        return None
    if (conversations := _conversations(plan)) is not None:
        return conversations.open_validation(packed=plan.finetune.packed)
    return pretrain.open_validation(config.data, cache_dir(config))


def steps(plan: RunPlan) -> int | None:
    """train.steps, or in finetune what its epochs come to: each row is read as often, and a few once more, to fill the
    last global batch."""
    config = plan.config
    if plan.stage != "finetune" or config.train.steps is not None:
        return config.train.steps
    return math.ceil(plan.finetune.epochs * len(open_training(plan)) / plan.global_batch)


def with_steps(plan: Plan, count: int | None) -> Plan:
    """The same run, with so many steps."""
    config = replace(plan.config, train=replace(plan.config.train, steps=count))
    return replace(plan, loaded=replace(plan.loaded, config=config))


def _conversations(plan: RunPlan) -> Conversations | None:
    if plan.template is None:
        return None
    data = plan.config.data
    if plan.stage == "evaluate":
        data = replace(data, train=())
    return Conversations(data, plan.tokenizer, plan.template, cache_dir(plan.config))
