"""The stages as Python functions: `from megatron_capgap import adapt, prune, distill, finetune, evaluate`.

Each runs on the calling process, which is one rank: alone, or one of those that a launcher started, all of
which call the function. It creates the process groups and destroys them, so that one stage may follow another.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_capgap.cli import run_stage
from megatron_capgap.common import log
from megatron_capgap.config.loader import LoadedConfig, load
from megatron_capgap.config.schema import Config
from megatron_capgap.distributed.environment import read_environment

Source = Config | Mapping[str, Any] | str | os.PathLike[str]
"""A configuration: an object, its keys and values as in YAML, or a YAML file."""


@dataclass(frozen=True)
class Result:
    """What a stage left behind. The files are read when an attribute is; rank 0 has written them."""

    run_dir: Path
    """The run directory, which the next stage names as a checkpoint."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one dict per step and one per evaluation; empty for stages without steps."""
        file = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    @property
    def losses(self) -> list[float]:
        """The training loss of each step that was logged, in order."""
        return [line["loss"] for line in self.metrics if "loss" in line]

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What `evaluate` found; None for other stages."""
        file = self.run_dir / "evaluation.json"
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the latest checkpoint; None if there is none."""
        latest = self.run_dir / "latest"
        return self.run_dir / "checkpoints" / latest.read_text().strip() if latest.is_file() else None


def adapt(config: Source, **overrides: Any) -> Result:
    """Trains on next tokens; the arguments are those of `run`."""
    return run("adapt", config, **overrides)


def prune(config: Source, **overrides: Any) -> Result:
    """Prunes a student out of a teacher; the arguments are those of `run`."""
    return run("prune", config, **overrides)


def distill(config: Source, **overrides: Any) -> Result:
    """Trains a student on a teacher's distributions; the arguments are those of `run`."""
    return run("distill", config, **overrides)


def finetune(config: Source, **overrides: Any) -> Result:
    """Trains on conversations; the arguments are those of `run`."""
    return run("finetune", config, **overrides)


def evaluate(config: Source, **overrides: Any) -> Result:
    """Computes the held-out loss; the arguments are those of `run`."""
    return run("evaluate", config, **overrides)


def run(stage: str, config: Source, **overrides: Any) -> Result:
    """Runs one stage. Collective over all ranks.

    Args:
        stage: its name.
        config: the configuration.
        overrides: sections and keys that take precedence, merged into those of `config`: `train={"steps": 20}`.

    Returns:
        The run directory and what is in it, also if a signal or the time limit stopped the run after saving.

    Raises:
        UserError: the configuration is invalid, or a file that it names; one line per problem.
    """
    environment = read_environment()
    log.set_rank(environment.rank if environment.world > 1 else None)
    loaded = _load(stage, config, overrides)
    hook = sys.excepthook
    try:
        run_stage(loaded, stage, environment)
    finally:
        sys.excepthook = hook  # torch wraps it once per process group, to put the rank before each line
    return Result(Path(loaded.config.run_dir))


def _load(stage: str, config: Source, overrides: Mapping[str, Any]) -> LoadedConfig:
    words = [f"--{key}={json.dumps(value, default=os.fspath)}" for key, value in _leaves("", overrides)]
    return load(os.fspath(config) if isinstance(config, str | os.PathLike) else config, words, stage)


def _leaves(prefix: str, values: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    """Dotted keys and values."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _leaves(f"{prefix}{key}.", value) if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
