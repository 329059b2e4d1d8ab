"""Crafted pickles, and what else a stranger's folder may hold: no code runs, nothing is read outside of it."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_capgap.checkpoint import checksummed_json, integrity
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

CHANGES = {"train__steps": 2, "data__valid": None}


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def reseal(folder: Path) -> None:
    """Lists the files anew, as one would who has put something into the folder on purpose."""
    files = {
        file.name: list(integrity.checksum(file)) for file in folder.iterdir() if file.name[:4] not in ("capg", "cont")
    }
    checksummed_json.write(folder / integrity.CONTENTS, {"files": files})


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def append(folder: Path, content: bytes, key: str) -> None:
    """Makes an entry of the checkpoint a lump of bytes at the end of its file."""

    def point(metadata: Any) -> None:
        (index, place) = next((i, p) for i, p in metadata.storage_data.items() if i.fqn == key)
        file = folder / place.relative_path
        for other in [i for i in metadata.storage_data if i.fqn == key]:
            del metadata.storage_data[other]

        moved = replace(place, offset=file.stat().st_size, length=len(content))
        metadata.storage_data[replace(index, offset=None, index=None)] = moved
        size = metadata.state_dict_metadata[key].size
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.state_dict_metadata[key].size = size  # what Megatron-Core looks at before it loads
        file.write_bytes(file.read_bytes() + content)

    change_metadata(folder, point)


def saved(thing: Any) -> bytes:
    """As torch.save writes it."""
    content = io.BytesIO()
    torch.save(thing, content)
    return content.getvalue()


WEIGHT = "decoder.layers.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"


def evil_metadata(folder: Path, evil: Evil) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(evil))


def evil_within_metadata(folder: Path, evil: Evil) -> None:
    change_metadata(folder, lambda metadata: setattr(metadata, "planner_data", {"a": [evil]}))


def evil_beyond_metadata(folder: Path, evil: Evil) -> None:
    """A second pickle after the first one, which is sound."""
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes() + pickle.dumps(evil))


def evil_common(folder: Path, evil: Evil) -> None:
    torch.save({"optimizer": evil}, folder / "common.pt")


def evil_old_common(folder: Path, evil: Evil) -> None:
    """In the format of torch before 1.6."""
    torch.save({"optimizer": evil}, folder / "common.pt", _use_new_zipfile_serialization=False)


def evil_tensor(folder: Path, evil: Evil) -> None:
    append(folder, saved(evil), NORM)


def evil_lump(folder: Path, evil: Evil) -> None:
    append(folder, saved(evil), WEIGHT)


def evil_instead_of_a_tensor(folder: Path, evil: Evil) -> None:
    """Where `.metadata` promises a tensor lies something else."""

    def move(metadata: Any) -> None:
        for index, place in list(metadata.storage_data.items()):
            if index.fqn == NORM:
                file, content = folder / place.relative_path, saved(evil)
                metadata.storage_data[index] = replace(place, offset=file.stat().st_size, length=len(content))
                file.write_bytes(file.read_bytes() + content)

    change_metadata(folder, move)


def evil_scales(folder: Path, evil: Evil) -> None:
    """FP8 scales of older checkpoints are a tensor of bytes, once more a pickle."""
    rename_to_scales(folder, saved(as_bytes(evil)))


def evil_list_of_scales(folder: Path, evil: Evil) -> None:
    """As Megatron-Core writes them."""
    rename_to_scales(folder, saved([as_bytes({}), as_bytes(evil)]))


def as_bytes(thing: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)


def evil_around_scales(folder: Path, evil: Evil) -> None:
    rename_to_scales(folder, saved(evil))


def evil_tensor_within_scales(folder: Path, evil: Evil) -> None:
    """torch.storage._load_from_bytes is on the list, and unpickles in turn."""

    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (saved(evil),)

    rename_to_scales(folder, saved([as_bytes({"scale_fwd": Storage()})]))


def rename_to_scales(folder: Path, content: bytes) -> None:
    def add(metadata: Any) -> None:

        (index, place) = next((i, p) for i, p in metadata.storage_data.items() if i.fqn == NORM)
        key, file = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", folder / place.relative_path
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        at = replace(index, fqn=key, offset=None, index=None)
        metadata.storage_data[at] = replace(place, offset=file.stat().st_size, length=len(content))
        file.write_bytes(file.read_bytes() + content)

    change_metadata(folder, add)


def nonsense(folder: Path, evil: Evil) -> None:
    """Sound names, but a number where a place should be."""
    change_metadata(folder, lambda metadata: metadata.storage_data.update({"a": 1}))


def file_outside(folder: Path, evil: Evil) -> None:
    """`.metadata` speaks of a file in another folder, which holds the right tensors."""
    outside = folder.parents[3] / "secret.distcp"
    shutil.copy(folder / "__0_0.distcp", outside)

    def point(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            object.__setattr__(place, "relative_path", f"../../../../{outside.name}")

    change_metadata(folder, point)


def link_outside(folder: Path, evil: Evil) -> None:
    outside = folder.parents[3] / "secret.distcp"
    (folder / "__0_0.distcp").rename(outside)
    (folder / "__0_0.distcp").symlink_to(outside)


CRAFTED: dict[Callable[[Path, Evil], None], str] = {
    evil_metadata: "posix.mkdir",
    evil_within_metadata: "posix.mkdir",
    evil_common: "common.pt: contains what no checkpoint needs",
    evil_old_common: "common.pt: contains what no checkpoint needs",
    evil_tensor: f"{NORM} is not a tensor",
    evil_lump: f"{WEIGHT} is not a tensor",
    evil_instead_of_a_tensor: "does not have what the model needs",
    evil_scales: "posix.mkdir",
    evil_list_of_scales: "posix.mkdir",
    evil_around_scales: "contains what no checkpoint needs",
    evil_tensor_within_scales: "contains what no checkpoint needs",
    nonsense: "contains what no checkpoint needs",
    file_outside: "secret.distcp', which is not a file of this checkpoint",
    link_outside: "__0_0.distcp: ",
}
# A rank of its own reads as the others do; what it adds is how it refuses, by each way of being noticed.
APART, COVERING = "teach from a rank of its own", {evil_metadata, evil_common, evil_tensor, file_outside}
USES = [
    pytest.param(
        use,
        crafted,
        marks=() if use != APART or crafted in COVERING else pytest.mark.matrix,
        id=f"{use}-{crafted.__name__}",
    )
    for use in ("resume", "teach", APART)
    for crafted in CRAFTED
]


@pytest.fixture(scope="module")
def sound(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoint step_2."""
    run_dir = tmp_path_factory.mktemp("safe") / "run"
    return runs.train(pool, "adapt", runs.adapt_config(fixtures, run_dir, **CHANGES))


def craft(sound: Path, folder: Path, crafted: Callable[[Path, Evil], None]) -> tuple[Path, Path]:
    """A copy of a run with something in its checkpoint; returns it and what will be there where code has run."""
    run_dir, marker = shutil.copytree(sound, folder / "run"), folder / "code_has_run"
    checkpoint = run_dir / "checkpoints" / "step_2"
    crafted(checkpoint, Evil(marker))
    if crafted is not link_outside:
        reseal(checkpoint)
    return run_dir, marker


def test_the_crafted_pickle_works(tmp_path: Path) -> None:
    marker = tmp_path / "code_has_run"
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.is_dir()


@pytest.mark.parametrize("use, crafted", USES)
def test_no_code_runs_and_nothing_is_loaded(
    pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path, use: str, crafted: Callable[[Path, Evil], None]
) -> None:
    run_dir, marker = craft(sound, tmp_path, crafted)
    before = runs.files_of(run_dir)
    if use == "resume":
        stage, config = "adapt", runs.adapt_config(fixtures, run_dir, **{**CHANGES, "train__steps": 3})
    else:
        apart = {} if use == "teach" else {"teacher__placement": "disjoint", "teacher__ranks": 1}
        stage, config = "distill", runs.distill_config(fixtures, tmp_path / "taught", run_dir, **CHANGES, **apart)
    rank, other = runs.run_stage(pool, stage, config, world=2)
    assert rank.value == other.value == 2, rank
    *_, line = rank.stderr.splitlines()
    assert line.startswith("capgap: error: ") and CRAFTED[crafted] in line
    assert not marker.exists()
    assert runs.files_of(run_dir) == before
    assert not (tmp_path / "taught").exists()


def export(run_dir: Path, out: Path) -> int:
    from tools import convert_hf

    return convert_hf.main(["export", "--checkpoint", str(run_dir), "--out", str(out)])


@pytest.mark.parametrize("crafted", [evil_metadata, evil_within_metadata, evil_common, evil_scales, file_outside])
def test_nor_is_it_exported(
    pool: WorkerPool, sound: Path, tmp_path: Path, crafted: Callable[[Path, Evil], None]
) -> None:
    run_dir, marker = craft(sound, tmp_path, crafted)
    (rank,) = pool.run(export, run_dir, tmp_path / "out", world=1, initialise=False, capture=True)
    assert rank.value == 2
    assert CRAFTED[crafted] in rank.stderr
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_what_lies_behind_the_metadata_is_never_read(
    pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path
) -> None:
    run_dir, marker = craft(sound, tmp_path, evil_beyond_metadata)
    runs.train(pool, "adapt", runs.adapt_config(fixtures, run_dir, **{**CHANGES, "train__steps": 3}))
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["a bare pickle", "an array of objects"])
def test_indices_of_the_data_are_numbers(
    pool: WorkerPool, fixtures: Fixtures, sound: Path, tmp_path: Path, kind: str
) -> None:
    run_dir, marker = shutil.copytree(sound, tmp_path / "run"), tmp_path / "code_has_run"
    file = next((run_dir / "data_cache").rglob("*.npy"))
    if kind == "a bare pickle":
        file.write_bytes(pickle.dumps(Evil(marker)))
    else:
        np.save(file, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    (rank,) = runs.run_stage(pool, "adapt", runs.adapt_config(fixtures, run_dir, **{**CHANGES, "train__steps": 3}))
    assert rank.value == 2
    assert f"capgap: error: {file}: is not a numeric array" in rank.stderr
    assert not marker.exists()


def test_the_metadata_names_nothing_that_another_python_lacks(sound: Path) -> None:
    """A Path has another name in Python 3.13's pickles."""
    modules = set()

    class Ear(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            modules.add(module)
            return super().find_class(module, name)

    with open(sound / "checkpoints" / "step_2" / ".metadata", "rb") as file:
        Ear(file).load()
    assert modules and {module.split(".")[0] for module in modules} == {"torch"}
