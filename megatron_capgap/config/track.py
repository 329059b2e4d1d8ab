"""The section `track`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_capgap.config.types import STRICT


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases (pip install -e '.[track]')."""

    __pydantic_config__ = STRICT

    project: str
    """Name of the project."""
    entity: str | None = None
    """User or team; null: the default one of the login."""
    mode: Literal["online", "offline"] = "online"
    """offline: write to run_dir/wandb, for `wandb sync` from where there is a network."""


@dataclass(frozen=True)
class MlflowConfig:
    """MLflow (pip install -e '.[track]')."""

    __pydantic_config__ = STRICT

    experiment: str
    """Name of the experiment; it is created if it does not exist."""
    uri: str | None = None
    """Tracking server or database; null: environment variable MLFLOW_TRACKING_URI, or the file run_dir/mlflow.db."""


@dataclass(frozen=True)
class TrackConfig:
    """Experiment trackers, beside metrics.jsonl and TensorBoard. They get the same numbers, the configuration, the git
    commit of the code, and the run continues in them when it resumes."""

    __pydantic_config__ = STRICT

    name: str | None = None
    """Name of the run; null: that of run_dir."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    wandb: WandbConfig | None = None
    """Weights & Biases; null: not used."""
    mlflow: MlflowConfig | None = None
    """MLflow; null: not used."""
