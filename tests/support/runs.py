"""Whole runs on tiny models: the material they read, their configurations, and what they leave behind."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_capgap.cli import main
from tests.support.corpus import conversations, texts, write_jsonl, write_lines
from tests.support.pool import RankResult, WorkerPool
from tests.support.processes import job

VOCAB = 301  # a prime with no tensor-parallel size to fit it
STUDENT = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": VOCAB}
TEACHER = {"layers": 4, "hidden": 48, "heads": 6, "kv_heads": 2, "ffn": 80, "vocab": VOCAB}


@dataclass(frozen=True)
class Fixtures:
    """A tokenizer, two indexed datasets made by tools/prepare_data.py, and two files of conversations, in a folder."""

    folder: Path

    @property
    def data(self) -> dict[str, Any]:
        """The data section of a configuration."""
        return {
            "tokenizer": str(self.folder / "tokenizer.model"),
            "train": [str(self.folder / "corpus_train")],
            "valid": [str(self.folder / "corpus_valid")],
            "sequence_length": 32,
        }

    @property
    def conversations(self) -> dict[str, Any]:
        """The data section of a configuration of finetune."""
        files = {name: [str(self.folder / f"chat_{name}.jsonl")] for name in ("train", "valid")}
        return {**self.data, **files, "sequence_length": 160}


def make_material(folder: Path) -> Fixtures:
    """Trains a tokenizer of exactly `VOCAB` tokens, cuts a corpus into samples and makes up conversations."""
    from tools import prepare_data

    words = ["--input", write_jsonl(folder / "corpus.jsonl", texts(300, seed=5)), "--split", "0.9,0.1"]
    words += ["--tokenizer", str(folder / "tokenizer.model"), "--train-tokenizer", str(VOCAB)]
    assert prepare_data.main([*words, "--out", str(folder / "corpus"), "--workers", "1"]) == 0
    write_lines(folder / "chat_train.jsonl", conversations(24, seed=1))
    write_lines(folder / "chat_valid.jsonl", conversations(9, seed=2))
    return Fixtures(folder)


def adapt_config(fixtures: Fixtures, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Four steps of next-token training on global batches of 8, in fp32 without dropout.

    Args:
        changes: dotted keys with `__` for the dots, as in `student__layout={"tensor": 2}`; None removes a key.
    """
    config = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "student": {"model": dict(STUDENT), "layout": {}},
        "data": fixtures.data,
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2, "eval_batches": 2},
        "optimizer": {"lr": 3.0e-3, "min_lr": 3.0e-4, "warmup_fraction": 0.0},
        "checkpoint": {"every": 0},
        "runtime": {"timeout_seconds": 60, "tensorboard": False},
    }
    return changed(config, **changes)


def distill_config(fixtures: Fixtures, run_dir: Path, teacher: Path, **changes: Any) -> dict[str, Any]:
    """As `adapt_config`, taught by a checkpoint in forward passes of four sequences where the student has two."""
    config = adapt_config(fixtures, run_dir)
    config["teacher"] = {"checkpoint": str(teacher), "micro_batch": 4}
    config["objective"] = {"temperature": 2.0}
    return changed(config, **changes)


def finetune_config(fixtures: Fixtures, run_dir: Path, student: Path, **changes: Any) -> dict[str, Any]:
    """As `adapt_config`, from a checkpoint, three steps of eight packed rows of conversations each."""
    config = adapt_config(fixtures, run_dir, student__model=None, student__checkpoint=str(student))
    config |= {"data": fixtures.conversations, "finetune": {"template": "default"}}
    return changed(config, **{"train__steps": 3, "train__eval_batches": None, **changes})


def taught(config: dict[str, Any], teacher: Path) -> dict[str, Any]:
    """The same run with a teacher, in forward passes of four rows where the student has two."""
    section = {"checkpoint": str(teacher), "micro_batch": 4, "longer_sequences": True}
    return {**config, "teacher": section, "objective": {"temperature": 2.0}}


def make_student(pool: WorkerPool, fixtures: Fixtures) -> Path:
    """`STUDENT` after two steps of next-token training."""
    changes = {"train__steps": 2, "data__valid": None}
    return train(pool, "adapt", adapt_config(fixtures, fixtures.folder / "runs" / "student", **changes))


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with some keys set, or removed where the new value is None."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        if value is None:
            section.pop(name)
        else:
            section[name] = value
    return config


def write_config(config: dict[str, Any], path: Path | None = None) -> str:
    """Writes a configuration, beside its run directory unless told otherwise; returns the file."""
    path = path or Path(f"{config['run_dir']}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


def run_stage(
    pool: WorkerPool, stage: str, config: dict[str, Any], world: int = 1, overrides: Sequence[str] = ()
) -> list[RankResult]:
    """Runs one stage on `world` ranks; the value of each rank is its exit code."""
    words = [stage, "--config", write_config(config), *overrides]
    return pool.run(main, words, world=world, initialise=False, capture=True)


def train(pool: WorkerPool, stage: str, config: dict[str, Any], world: int = 1) -> Path:
    """Runs one stage that must succeed; returns its run directory."""
    ranks = run_stage(pool, stage, config, world)
    assert [rank.value for rank in ranks] == [0] * world, ranks
    assert all(not rank.stdout for rank in ranks[1:]), "only the first rank speaks"
    return Path(config["run_dir"])


def train_apart(stage: str, config: dict[str, Any], world: int = 1, limit: float = 120.0) -> list[dict[str, Any]]:
    """Runs a stage that must succeed in processes of its own, as a user starts it; returns its training steps."""
    run_dir = Path(config["run_dir"])
    output = run_dir.with_name(f"{run_dir.name}_output")
    with job([stage, "--config", write_config(config)], world, output, cold=True) as ranks:
        assert ranks.wait(limit) == [0] * world, ranks.stderr()
    return steps_of(run_dir)


def make_teacher(pool: WorkerPool, fixtures: Fixtures) -> Path:
    """Trains `TEACHER` until its predictions differ clearly from those of random weights."""
    changes = {"student__model": TEACHER, "train__steps": 25, "optimizer__lr": 1.0e-2, "data__valid": None}
    return train(pool, "adapt", adapt_config(fixtures, fixtures.folder / "runs" / "teacher", **changes))


FIELDS_OF_A_CLOCK = {"time", "step_seconds", "tokens_per_second", "peak_memory_bytes"}
"""Fields of metrics.jsonl that differ between two equal runs: times, and the memory that the system counts."""


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole, without `FIELDS_OF_A_CLOCK`."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in entry.items() if k not in FIELDS_OF_A_CLOCK} for entry in entries]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The training steps in metrics.jsonl."""
    return [entry for entry in metrics(run_dir) if "loss" in entry]


def checkpoints(run_dir: Path) -> list[str]:
    """What lies in the folder of checkpoints, by name."""
    return sorted(os.listdir(run_dir / "checkpoints"))


def files_of(folder: Path) -> dict[str, bytes] | None:
    """Every file below a folder with its content; None where there is no folder. A run's logs are left out, where a
    start that has nothing to do may say so."""
    if not folder.exists():
        return None
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if not name.startswith("logs/")}


def rewind(run_dir: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was after an earlier checkpoint that is still there."""
    shutil.copytree(run_dir, copy)
    for folder in (copy / "checkpoints").iterdir():
        if folder.name != f"step_{step}":
            shutil.rmtree(folder)
    (copy / "latest").write_text(f"step_{step}\n")
    return copy


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float, where: str = "") -> None:
    """Every number of two entries of metrics.jsonl agrees to a relative tolerance."""
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        error = abs(found[name] - value) / abs(value)
        assert error <= tolerance, f"{where} step {expected['step']}: {name} {found[name]} vs {value}: {error:.1e}"
