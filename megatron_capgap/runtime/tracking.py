"""Experiment trackers: sends the numbers of metrics.jsonl to Weights & Biases and MLflow. Rank 0 only.

A tracker that fails while the run trains is given up with a warning; one that fails at the start is an error.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_capgap import __version__
from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.common.log import LOG
from megatron_capgap.config.track import MlflowConfig, TrackConfig, WandbConfig

_IDS = "tracking.json"
"""File in the run directory with the trackers' ids of the run: a resumed run continues there."""
_MLFLOW_PARAMS, _MLFLOW_METRICS = 100, 1000
"""MLflow's limits for one request."""
_MLFLOW_VALUE = 6000
"""MLflow's limit for a parameter's length."""
_SECONDS_TO_CLOSE = 60.0


class Tracker(Protocol):
    """One tracker of a run."""

    name: str
    """Key in the section `track`."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends numbers of a step; does not wait for a network."""

    def close(self, *, failed: bool) -> None:
        """Sends what is left and ends the session."""


@dataclass(frozen=True)
class _Run:
    """What every tracker is told of a run."""

    name: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    """Stage, commit and version."""
    run_dir: Path


def start(track: TrackConfig, config: Mapping[str, Any], stage: str, run_dir: Path) -> list[Tracker]:
    """Starts the trackers of a run, or continues in them.

    Args:
        track: the section.
        config: the whole configuration, as nested mappings.
        stage: name of the stage.
        run_dir: the run directory.

    Raises:
        UserError: a tracker cannot be started, for example without a login.
    """
    path = run_dir / _IDS
    ids: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    facts = {"stage": stage, "git_commit": git_commit(), "capgap_version": __version__}
    run = _Run(track.name or run_dir.resolve().name, track.tags, config, facts, run_dir)
    started: list[Tracker] = []
    makers: dict[str, Callable[[], _Wandb | _Mlflow]] = {}
    if (wandb := track.wandb) is not None:
        makers["wandb"] = lambda: _Wandb(wandb, run, ids.get("wandb"))
    if (mlflow := track.mlflow) is not None:
        makers["mlflow"] = lambda: _Mlflow(mlflow, run, ids.get("mlflow"))
    for key, make in makers.items():
        try:
            tracker = make()
        except Exception as error:
            for other in started:
                other.close(failed=True)
            fix = "log in, set mode: offline, or remove the section" if key == "wandb" else "see track.mlflow.uri"
            raise UserError(f"track.{key}: {in_one_line(error, 300)}; {fix}") from error
        started.append(tracker)
        ids[key] = tracker.run_id
    try:
        write_atomically(path, json.dumps(ids))
    except OSError as error:
        for other in started:
            other.close(failed=True)
        raise UserError(f"{path}: {error.strerror}; free some space, or remove the section track") from error
    return started


def git_commit() -> str:
    """Commit of the clone that this package is in, with `-dirty` if files have changed since; "" outside a clone."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""


class _Wandb:
    """A run of Weights & Biases; its own process sends the numbers."""

    name = "wandb"

    def __init__(self, options: WandbConfig, run: _Run, run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            mode=options.mode,
            id=run_id,
            resume="allow" if options.mode == "online" else None,
            name=run.name,
            tags=list(run.tags),
            job_type=run.facts["stage"],
            config={**run.config, **run.facts},
            allow_val_change=True,
            dir=str(run.run_dir),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run_id = str(self._run.id)
        # The axis is the run's own step: a resumed run repeats the steps after its checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **numbers})

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """A run of MLflow; a thread sends the numbers, in as few requests as it can."""

    name = "mlflow"

    def __init__(self, options: MlflowConfig, run: _Run, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.run_dir.resolve()}/mlflow.db"
        self._client = MlflowClient(tracking_uri=uri)
        if run_id is None:
            found = self._client.get_experiment_by_name(options.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(options.experiment)
            run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
            params = [Param(key, value[:_MLFLOW_VALUE]) for key, value in _leaves(run.config)]
            for first in range(0, len(params), _MLFLOW_PARAMS):
                self._client.log_batch(run_id, params=params[first : first + _MLFLOW_PARAMS])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = str(run_id)
        told = {**run.facts, "mlflow.source.git.commit": run.facts["git_commit"], **dict.fromkeys(run.tags, "true")}
        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in told.items()])
        self._queue: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._send, daemon=True, name="mlflow")
        self._thread.start()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker`."""
        if self._error is not None:
            raise self._error
        now = round(time.time() * 1000)
        self._queue.put([self._metric(key, value, now, step) for key, value in numbers.items()])

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._queue.put(None)
        self._thread.join(_SECONDS_TO_CLOSE)
        if self._error is not None:
            raise self._error
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")

    def _send(self) -> None:
        """Thread: sends everything that waits, until None."""
        ended = False
        while not ended:
            waiting: list[Any] = []
            metrics = self._queue.get()
            while metrics is not None:
                waiting += metrics
                if self._queue.empty():
                    break
                metrics = self._queue.get()
            ended = metrics is None
            try:
                for first in range(0, len(waiting), _MLFLOW_METRICS):
                    self._client.log_batch(self.run_id, metrics=waiting[first : first + _MLFLOW_METRICS])
            except Exception as error:  # raised in the training thread
                self._error = error
                return


def _leaves(config: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        inside = f"{key}.{name}" if key else name
        if isinstance(value, Mapping):
            yield from _leaves(value, inside)
        else:
            yield inside, value if isinstance(value, str) else json.dumps(value)


class Trackers:
    """The trackers of a run, of which those that fail are given up."""

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []

    def add(self, trackers: list[Tracker]) -> None:
        """Adds trackers."""
        self._trackers += trackers

    def log(self, entry: Mapping[str, Any]) -> None:
        """Sends the numbers of an entry of metrics.jsonl."""
        numbers = {key: value for key, value in entry.items() if key != "step" and isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(entry["step"], numbers))

    def close(self, *, failed: bool = False) -> None:
        """Ends all sessions."""
        self._each(lambda tracker: tracker.close(failed=failed))
        self._trackers = []

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                work(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                LOG.warning(f"track.{tracker.name}: {in_one_line(error, 300)}; this run is no longer tracked there")
