"""Every file of a checkpoint flipped, cut and deleted in turn: always seen, never used, the previous one is."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_capgap.checkpoint import integrity
from megatron_capgap.checkpoint.metadata import CheckpointCorrupted
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

CHANGES = {"train__steps": 4, "checkpoint__every": 2, "data__valid": None}
RANKS = 2
NAMES = [".metadata", "__0_0.distcp", "__1_0.distcp", "capgap.json", "common.pt", "contents.json", "metadata.json"]


@pytest.fixture(scope="module")
def sound(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks with the checkpoints step_2 and step_4."""
    return runs.train(pool, "adapt", config(fixtures, tmp_path_factory.mktemp("damage") / "run"), RANKS)


def config(fixtures: Fixtures, run_dir: Path) -> dict:
    return runs.adapt_config(fixtures, run_dir, **CHANGES)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def flip_in_the_middle(file: Path) -> None:
    flip(file, file.stat().st_size * 4 + 1)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped bit": flip_in_the_middle, "cut": cut, "deleted": Path.unlink}


def refusals(folder: Path, flips: int) -> dict[str, str]:
    """Damages each file in turn, on rank 0, and tells what `verify` says of it; "" where it sees nothing."""

    def said() -> str:
        dist.barrier()
        try:
            integrity.verify(folder)
        except CheckpointCorrupted as error:
            return str(error)
        finally:
            dist.barrier()
        return ""

    found = {"nothing": said()}
    for name in sorted(os.listdir(folder)):
        file = folder / name
        before = file.read_bytes()
        size, bits = len(before), len(before) * 8
        changes = {f"bit {bit}": partial(flip, bit=bit) for bit in [*range(0, bits, bits // flips + 1), bits - 1]}
        changes["shorter by one"] = partial(os.truncate, length=size - 1)
        changes["longer by one"] = partial(os.truncate, length=size + 1)
        for what, change in (changes | DAMAGES).items():
            dist.barrier()
            if dist.get_rank() == 0:
                change(file)
            found[f"{name}: {what}"] = said()
            if dist.get_rank() == 0:
                file.write_bytes(before)
    return found | {"nothing again": said()}


def test_every_damage_to_every_file_is_seen_on_every_rank(pool: WorkerPool, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound / "checkpoints" / "step_4", tmp_path / "step_4")
    assert sorted(os.listdir(folder)) == NAMES
    first, second = pool.run(refusals, folder, 25, world=RANKS)
    assert first == second
    assert first.pop("nothing") == first.pop("nothing again") == ""
    assert len(first) > 200
    assert [what for what, said in first.items() if not said] == []
    for what, said in first.items():
        name = what.split(":")[0]
        assert str(folder / name) in said or (name == "capgap.json" and f"{folder}: no capgap.json" in said)
        assert "\n" not in said


@pytest.mark.slow("each damage needs a run that meets it and one that never did")
@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_the_previous_checkpoint_is_used(
    pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path, name: str, what: str
) -> None:
    run_dir = shutil.copytree(sound, tmp_path / "run")
    DAMAGES[what](run_dir / "checkpoints" / "step_4" / name)
    first, _ = runs.run_stage(pool, "adapt", config(fixtures, run_dir), RANKS)
    assert first.value == 0, first
    assert (
        f"capgap: warning: step_4 is damaged and skipped: {run_dir}/checkpoints/step_4" in first.stderr.split("\n")[0]
    )
    assert name in first.stderr
    assert f"resumed from {run_dir}/checkpoints/step_2: step 2 of 4" in first.stdout
    assert runs.metrics(run_dir) == runs.metrics(sound)
    assert runs.checkpoints(run_dir) == ["step_2", "step_4", "step_4.damaged"]
    assert (run_dir / "latest").read_text() == "step_4\n"


POINTERS = {
    "flipped bit": (
        "step_6\n",
        "latest: names 'step_6', which is not a complete checkpoint (existing: step_2, step_4)",
    ),
    "cut": ("step_", "latest: names 'step_', which is not a complete checkpoint (existing: step_2, step_4)"),
    "cut by one": ("step_4", "latest: names 'step_4'"),
    "empty": ("", "latest: names ''"),
    "binary": ("\udcff", "latest: cannot be read"),
    "elsewhere": ("../../other/step_4\n", "latest: names '../../other/step_4'"),
    "deleted": (None, "latest: is missing, although there are checkpoints (step_2, step_4)"),
    "older": ("step_2\n", "latest: names step_2 although step_4 exists; resuming from step_2"),
}


@pytest.mark.parametrize("what", POINTERS)
def test_damage_to_latest_is_said_and_the_newest_whole_checkpoint_is_used(
    pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path, what: str
) -> None:
    run_dir = shutil.copytree(sound, tmp_path / "run")
    content, says = POINTERS[what]
    if content is None:
        (run_dir / "latest").unlink()
    else:
        (run_dir / "latest").write_bytes(content.encode("utf-8", "surrogateescape"))
    first, _ = runs.run_stage(pool, "adapt", config(fixtures, run_dir), RANKS)
    assert first.value == 0, first
    assert f"capgap: warning: {run_dir}/{says}" in first.stderr
    assert f"resumed from {run_dir}/checkpoints/step_{2 if what == 'older' else 4}" in first.stdout
    assert (run_dir / "latest").read_text() == "step_4\n"
    assert runs.metrics(run_dir) == runs.metrics(sound)


@pytest.mark.parametrize("name", ["__1_0.distcp", "capgap.json"])
def test_none_left_is_an_error_and_nothing_is_touched(
    pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path, name: str
) -> None:
    run_dir = shutil.copytree(sound, tmp_path / "run")
    for step in (2, 4):
        cut(run_dir / "checkpoints" / f"step_{step}" / name)
    before = runs.files_of(run_dir)
    ranks = runs.run_stage(pool, "adapt", config(fixtures, run_dir), RANKS)
    assert [rank.value for rank in ranks] == [2, 2]
    *_, line = ranks[0].stderr.splitlines()
    assert (
        f"{run_dir}: no checkpoint of this run is intact, 2 found damaged, first {run_dir}/checkpoints/step_4" in line
    )
    assert runs.files_of(run_dir) == before


def test_checkpoints_that_vanished_do_not_make_a_new_run(
    pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(sound, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    (rank,) = runs.run_stage(pool, "adapt", config(fixtures, run_dir))
    assert rank.value == 2
    assert f"{run_dir}: no checkpoint of this run is intact" in rank.stderr


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_teacher_is_an_error_that_names_the_file(
    pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path, world: int
) -> None:
    teacher = shutil.copytree(sound, tmp_path / "teacher")
    file = teacher / "checkpoints" / "step_4" / "__1_0.distcp"
    flip_in_the_middle(file)
    ranks = runs.run_stage(pool, "distill", runs.distill_config(fixtures, tmp_path / "run", teacher), world)
    assert [rank.value for rank in ranks] == [2] * world
    says = f"capgap: error: {file}: checksum mismatch; use another checkpoint\n"
    assert ranks[0].stderr == says
    assert not (tmp_path / "run").exists()


def test_a_whole_run_says_nothing(pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(sound, tmp_path / "run")
    first, second = runs.run_stage(pool, "adapt", config(fixtures, run_dir), RANKS)
    assert first.stderr == second.stderr == ""


def evaluate_what_is_cut_once_verified(file: Path, words: list[str]) -> int:
    """The file of one rank breaks between the check of all sums and the reading; the exit code."""
    from megatron_capgap.cli import main

    def verify_then_cut(folder: Path) -> None:
        verify(folder)
        if dist.get_rank() == 0:
            os.truncate(file, 100)
        dist.barrier()

    verify, integrity.verify = integrity.verify, verify_then_cut
    try:
        return main(words)
    finally:
        integrity.verify = verify


def test_what_only_one_rank_cannot_read_ends_all(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """With tensor 2 the second file holds what rank 1 alone reads; from Megatron-Core 0.18 on it alone is told."""
    changes = {**CHANGES, "student__layout": {"tensor": 2}}
    run_dir = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "run", **changes), RANKS)
    file = run_dir / "checkpoints" / "step_4" / "__1_0.distcp"
    source = {"student__model": None, "student__checkpoint": str(run_dir), "student__layout": {"tensor": 2}}
    evaluation = runs.adapt_config(fixtures, tmp_path / "evaluation", **source)
    words = ["evaluate", "--config", runs.write_config(evaluation)]
    ranks = pool.run(evaluate_what_is_cut_once_verified, file, words, world=RANKS, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [2, 2]
    assert ranks[0].stderr.startswith(f"capgap: error: {run_dir}/checkpoints/step_4: "), ranks
    assert ranks[0].stderr.count("\n") == 1 and "Traceback" not in ranks[1].stderr
