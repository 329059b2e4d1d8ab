"""Overlap of communication and computation over data-parallel ranks: the run without it, to the last digit.

Buckets decide in which blocks a gradient norm is summed, so its last digit depends on them; nothing else does where
gradients are not clipped by it.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_capgap.cli import main
from tests.support import runs
from tests.support.pool import WorkerError, WorkerPool
from tests.support.runs import Fixtures

# Two data-parallel ranks each.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "pp2": (4, {"pipeline": 2}),
    "pp2_vp2": (4, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_sp": (4, {"tensor": 2, "sequence": True}),
}
BUCKET = 2000  # parameters; the student has more than ten thousand
MATCHED = [{"student_layer": 1, "teacher_layer": 2}, {"student_layer": 4, "teacher_layer": 3, "kind": "cosine"}]
Run = Callable[..., tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]


def in_small_buckets(words: list[str], waits: bool) -> int:
    """Runs a command with buckets smaller than the model; without the waits for weights that are read by hand, if
    asked to."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_capgap.training import optimizer, param_sync

    small = partial(DistributedDataParallelConfig, bucket_size=BUCKET)
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", small):
        if waits:
            return main(words)
        with mock.patch.object(param_sync, "wait_for", lambda chunk, weights: None):
            return main(words)


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of all checkpoints, weights and moments; the files also depend on the order they are written in."""
    found: dict[str, torch.Tensor] = {}
    for folder in sorted((run_dir / "checkpoints").iterdir()):
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        checkpoint.load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
        found |= {f"{folder.name} {name}": tensor for name, tensor in tensors.items()}
    assert found
    return found


def unequal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def run(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Metrics and checkpoints of four distillation steps, saved and evaluated after every second one."""

    @cache
    def run(layout: str, tied: bool, matched: bool, overlap: bool) -> Any:
        world, cut = LAYOUTS[layout]
        changes: dict[str, Any] = {"student__layout": cut, "student__model__tied_embeddings": tied}
        changes |= {"train__overlap": overlap, "train__eval_every": 2, "checkpoint__every": 2, "checkpoint__keep": 3}
        changes |= {"objective__matching": MATCHED if matched else [], "optimizer__clip_norm": 0.0}
        raw = runs.distill_config(fixtures, tmp_path_factory.mktemp(layout) / "run", teacher, **changes)
        words = ["distill", "--config", runs.write_config(raw)]
        ranks = pool.run(in_small_buckets, words, True, world=world, initialise=False, capture=True)
        assert [rank.value for rank in ranks] == [0] * world, ranks
        return runs.metrics(Path(raw["run_dir"])), state(Path(raw["run_dir"]))

    return run


def assert_same(run: Run, layout: str, tied: bool, matched: bool) -> None:
    found, expected = (run(layout, tied, matched, overlap) for overlap in (True, False))
    assert not unequal(found[1], expected[1])
    for mine, theirs in zip(found[0], expected[0], strict=True):
        norms = [entry.get("grad_norm", 1.0) for entry in (mine, theirs)]
        assert {**mine, "grad_norm": 0.0} == {**theirs, "grad_norm": 0.0}
        assert abs(norms[0] / norms[1] - 1) < 1e-6


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_the_same_to_the_last_digit(run: Run, layout: str, tied: bool) -> None:
    assert_same(run, layout, tied, matched=False)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_projections_are_waited_for(run: Run, layout: str) -> None:
    assert_same(run, layout, tied=False, matched=True)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_in_one_bucket_clipping_is_the_same_too(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, layout: str
) -> None:
    world, cut = LAYOUTS[layout]
    found = []
    for overlap in (True, False):
        changes = {"student__layout": cut, "train__overlap": overlap, "optimizer__clip_norm": 0.5}
        raw = runs.adapt_config(fixtures, tmp_path / str(overlap), **changes)
        run_dir = runs.train(pool, "adapt", raw, world)
        found.append((runs.metrics(run_dir), state(run_dir)))
    assert found[0][0] == found[1][0]
    assert not unequal(found[0][1], found[1][1])


def test_a_weight_that_is_not_waited_for_is_noticed(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """The tests above would not be worth much if a head of the step before gave the same numbers."""
    raw = runs.adapt_config(fixtures, tmp_path / "run", train__overlap=True, data__valid=None)
    words = ["adapt", "--config", runs.write_config(raw)]
    try:
        pool.run(in_small_buckets, words, False, world=2, initialise=False)
    except WorkerError as error:  # Megatron itself misses the gather that nobody waited for
        assert "param_gather_handle is None" in str(error)
        return
    assert runs.metrics(tmp_path / "run") != runs.metrics(
        runs.train(pool, "adapt", runs.changed(raw, run_dir=str(tmp_path / "other"), train__overlap=False), 2)
    )


def test_an_interrupted_run_goes_on_to_the_last_digit(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"train__overlap": True, "train__steps": 4, "checkpoint__every": 2, "checkpoint__keep": 2}
    raw = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    unbroken = runs.train(pool, "adapt", raw, 2)
    copy = runs.rewind(unbroken, tmp_path / "copy", step=2)
    runs.train(pool, "adapt", runs.changed(raw, run_dir=str(copy)), 2)
    assert runs.metrics(copy) == runs.metrics(unbroken)
    assert not unequal(state(copy), state(unbroken))
