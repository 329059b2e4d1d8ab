"""Datasets of a run: indexed datasets or conversations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config.schema import Config
from megatron_capgap.data import pretrain
from megatron_capgap.data.batch import TokenDataset
from megatron_capgap.data.conversation_dataset import ConversationDataset
from megatron_capgap.stages.plan import RunPlan
from megatron_capgap.stages.resolve import missing_data

PlanT = TypeVar("PlanT", bound=RunPlan)


def cache_dir(config: Config) -> Path:
    """Folder of sample indices and encoded conversations."""
    return Path(config.run_dir) / "data_cache"


def build_indices(plan: RunPlan) -> list[str]:
    """Validates the data and indexes or encodes them, once for all ranks. Rank 0 only.

    Returns:
        Warnings for the user.

    Raises:
        UserError: data are missing, corrupted or of the wrong kind for the stage.
    """
    config = plan.config
    if problems := missing_data(plan.loaded, plan.stage):
        raise ConfigError(problems)
    if (conversations := _conversations(plan)) is not None:
        return conversations.build(plan.student.vocab)
    pretrain.build_indices(config.data, plan.student.vocab, config.seed, cache_dir(config))
    return []


def open_training(plan: RunPlan) -> TokenDataset:
    """Samples of data.train, without end; sample k is the same in every layout."""
    config = plan.config
    if (conversations := _conversations(plan)) is not None:
        return conversations.open_training(config.seed, packed=plan.finetune.packed)
    return pretrain.open_training(config.data, config.seed, cache_dir(config))


def open_validation(plan: RunPlan) -> TokenDataset | None:
    """Every sample of data.valid once; None if data.valid is empty."""
    config = plan.config
    if not config.data.valid:
        return None
    if (conversations := _conversations(plan)) is not None:
        return conversations.open_validation(packed=plan.finetune.packed)
    return pretrain.open_validation(config.data, cache_dir(config))


def steps(plan: RunPlan) -> int | None:
    """train.steps, or in finetune the steps of its epochs: every row is read equally often, except that some are read
    once more to fill the last global batch."""
    config = plan.config
    if plan.stage != "finetune" or config.train.steps is not None:
        return config.train.steps
    return math.ceil(plan.finetune.epochs * len(open_training(plan)) / plan.global_batch)


def with_steps(plan: PlanT, count: int | None) -> PlanT:
    """The plan with train.steps set to `count`."""
    config = replace(plan.config, train=replace(plan.config.train, steps=count))
    return replace(plan, loaded=replace(plan.loaded, config=config))


def _conversations(plan: RunPlan) -> ConversationDataset | None:
    if plan.template is None:
        return None
    data = plan.config.data
    if plan.stage == "evaluate":
        data = replace(data, train=())
    return ConversationDataset(data, plan.tokenizer, plan.template, cache_dir(plan.config))
