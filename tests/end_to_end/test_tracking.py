"""Weights & Biases and MLflow, both offline: what a run and its continuation leave there."""

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

TRACK = {
    "name": "a name",
    "tags": ["tiny", "test"],
    "wandb": {"project": "capgap", "mode": "offline"},
    "mlflow": {"experiment": "capgap"},
}


@pytest.fixture(scope="module")
def run_dir(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that is continued to the fifth."""
    if not all(importlib.util.find_spec(name) for name in ("wandb", "mlflow")):
        pytest.skip("wandb and mlflow are not installed (extra track)")
    config = runs.adapt_config(fixtures, tmp_path_factory.mktemp("tracked") / "run", track=TRACK, train__steps=3)
    runs.train(pool, "adapt", config)
    return runs.train(pool, "adapt", runs.changed(config, train__steps=5))


def records_of_wandb(folder: Path) -> Iterator[Any]:
    """The records of an offline session, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    # LevelDB's log: blocks of 32 KiB after a header; a record is whole, or in a first, middle and last part.
    whole, first, last = 1, 2, 4
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at) if left >= 7 else (0, 0, 0)
        if kind == 0:  # the rest of a block is empty
            at += left
            continue
        part, at = data[at + 7 : at + 7 + length], at + 7 + length
        parts = part if kind in (whole, first) else parts + part
        if kind in (whole, last):
            record = Record()
            record.ParseFromString(parts)
            yield record


def entries_of_file(run_dir: Path) -> list[dict[str, Any]]:
    return runs.metrics(run_dir)


def test_wandb_has_the_run_and_its_continuation(run_dir: Path) -> None:
    sessions = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2 and len({folder.name.rpartition("-")[2] for folder in sessions}) == 1, "one id"
    rows = []
    for folder in sessions:
        records = list(records_of_wandb(folder))
        (about,) = [record.run for record in records if record.HasField("run")]
        config = {update.key: json.loads(update.value_json) for update in about.config.update}
        assert about.display_name == "a name" and list(about.tags) == ["tiny", "test"] and about.project == "capgap"
        assert config["train"]["global_batch"] == 8 and config["stage"] == "adapt" and "git_commit" in config
        for record in records:
            if record.HasField("history"):
                items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items()})
    expected = entries_of_file(run_dir)
    assert [row["step"] for row in rows] == [entry["step"] for entry in expected]
    for row, entry in zip(rows, expected, strict=True):
        assert entry.items() <= row.items()


def test_mlflow_has_the_run_and_its_continuation(run_dir: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("capgap").experiment_id])
    assert run.info.run_name == "a name" and run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "3" and run.data.params["optimizer.betas"] == "[0.9, 0.95]"
    assert run.data.tags["tiny"] == "true" and run.data.tags["stage"] == "adapt"
    assert "mlflow.source.git.commit" in run.data.tags
    expected = entries_of_file(run_dir)
    for name in ("loss", "valid_loss", "tokens"):
        found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        assert found == [(entry["step"], entry[name]) for entry in expected if name in entry]


def test_a_tracker_that_fails_at_the_start_is_an_error_and_later_a_warning(
    run_dir: Path, tmp_path: Path, pool: WorkerPool, fixtures: Fixtures, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = {"mlflow": {"experiment": "capgap", "uri": "nonsense://nowhere"}}
    (rank,) = runs.run_stage(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "run", track=nowhere))
    assert rank.value == 2 and rank.stderr.splitlines()[-1].startswith("capgap: error: track.mlflow: ")
    assert not (tmp_path / "run").exists()


class Failing:
    """A tracker that has lost its server."""

    name = "wandb"

    def log(self, step: int, numbers: Any) -> None:
        raise ConnectionError("no route to host")

    def close(self, *, failed: bool) -> None:
        raise AssertionError("it was given up before")


def test_a_tracker_that_fails_later_is_given_up_with_a_warning(tmp_path: Path, capsys: Any) -> None:
    from megatron_capgap.runtime.logging import RunLogger

    log = RunLogger(tmp_path, is_rank0=True)
    log.trackers.add([Failing()])
    for step in (1, 2):
        log.record({"step": step, "loss": 1.0})
    log.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("warning: track.wandb: no route to host; this run is no longer tracked there")
    assert len(runs.metrics(tmp_path)) == 2
