"""Kinds of bad input: one line from one rank that names key or file, value and fix, exit code 2, no traces."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.checkpoint import checksummed_json
from megatron_capgap.cli import main
from megatron_capgap.data import indexed
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import corpus, runs
from tests.support.pool import WorkerPool
from tests.support.processes import job
from tests.support.runs import Fixtures


@dataclass(frozen=True)
class Mistake:
    """One kind of bad input to adapt, or to distill where there is a teacher."""

    says: tuple[str, ...]
    """What the error line must hold: key or file, value, fix. FOLDER stands for the test's own folder."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the configuration, as in `runs.changed`; FOLDER is filled in here too."""
    spoil: Callable[[Path], object] = lambda folder: None
    """What is done to the folder with the data before the run starts."""
    stage: str = "adapt"
    worlds: tuple[int, ...] = (1,)


def cut_off(folder: Path) -> None:
    os.truncate(folder / "corpus_train.bin", 1001)


def cut_off_held_out(folder: Path) -> None:
    os.truncate(folder / "corpus_valid.bin", 1001)


def large_tokenizer(folder: Path) -> None:
    corpus.save_sentencepiece(folder / "large.model", 400)


def reshaped_teacher(folder: Path) -> None:
    """A teacher whose words say another width than its shards have."""
    meta = folder / "teacher" / "checkpoints" / "step_25" / "capgap.json"
    content = checksummed_json.read(meta)
    content["model"]["ffn"] = 96
    checksummed_json.write(meta, content)


def checkpoint_of_megatron_lm(folder: Path) -> None:
    """What Megatron-LM writes on Megatron-Core 0.19, which has no common.pt; its files are empty here."""
    (folder / "lm" / "iter_0000010").mkdir(parents=True)
    (folder / "lm" / "latest_checkpointed_iteration.txt").write_text("10")
    for name in (".metadata", "metadata.json", "__0_0.distcp"):
        (folder / "lm" / "iter_0000010" / name).touch()


MISTAKES = {
    "unknown key": Mistake(
        ("FOLDER/run.yaml:", "student.layout.tensr: unknown key", "did you mean student.layout.tensor?"),
        {"student__layout": {"tensr": 2}},
        worlds=(1, 2),
    ),
    "bad type": Mistake(
        ("FOLDER/run.yaml:", 'train.steps: "many" given', "expected an integer > 0 or null"), {"train__steps": "many"}
    ),
    "heads not divisible by tensor": Mistake(
        ("student.layout.tensor: 2 does not divide", "student.model.heads 3", "valid values: 1"),
        {
            "student__layout": {"tensor": 2},
            "student__model__heads": 3,
            "student__model__kv_heads": 3,
            "student__model__hidden": 48,
        },
        worlds=(2,),
    ),
    "batch not divisible": Mistake(
        ("train.global_batch: 9 is not a multiple of train.micro_batch 2", "valid values: 8 or 10"),
        {"train__global_batch": 9},
    ),
    "batch not divisible over ranks": Mistake(
        (
            "train.global_batch: 6 is not a multiple of",
            "micro_batch 2 * data-parallel size 2 = 4",
            "valid values: 4 or 8",
        ),
        {"train__global_batch": 6},
        worlds=(2,),
    ),
    "missing data file": Mistake(
        (
            ": data.train: dataset FOLDER/corpus_trian: FOLDER/corpus_trian.bin does not exist",
            "did you mean FOLDER/corpus_train",
        ),
        {"data__train": ["FOLDER/corpus_trian"]},
        worlds=(1, 2),
    ),
    "truncated .bin": Mistake(
        ("FOLDER/corpus_train.bin has 1001 bytes", "expects", "create it again with tools/prepare_data.py"),
        spoil=cut_off,
        worlds=(1, 2),
    ),
    "truncated held-out .bin": Mistake(
        ("FOLDER/corpus_valid.bin has 1001 bytes", "expects", "create it again with tools/prepare_data.py"),
        spoil=cut_off_held_out,
    ),
    "tokenizer too large": Mistake(
        ("data.tokenizer: FOLDER/large.model has 400 tokens", "vocab is 301", "set student.model.vocab to 400"),
        {"data__tokenizer": "FOLDER/large.model"},
        spoil=large_tokenizer,
        worlds=(1, 2),
    ),
    "checkpoint of another shape than it says": Mistake(
        ("FOLDER/teacher/checkpoints/step_25", "[4, 160, 48]", "(4, 192, 48)", "use a checkpoint of the model's shape"),
        spoil=reshaped_teacher,
        stage="distill",
        worlds=(1, 2),
    ),
    "checkpoint of Megatron-LM": Mistake(
        ("teacher.checkpoint: FOLDER/lm: is a checkpoint of Megatron-LM", "with tools/convert_hf.py import"),
        {"teacher__checkpoint": "FOLDER/lm"},
        spoil=checkpoint_of_megatron_lm,
        stage="distill",
        worlds=(1, 2),
    ),
    "checkpoint of Megatron-LM, one iteration of it, as student": Mistake(
        ("student.checkpoint: FOLDER/lm/iter_0000010: is a checkpoint of Megatron-LM", "(it has .metadata)"),
        {"student__model": None, "student__checkpoint": "FOLDER/lm/iter_0000010"},
        spoil=checkpoint_of_megatron_lm,
    ),
    "run_dir not writable": Mistake(
        ("run_dir: FOLDER/corpus.jsonl/run is not writable (Not a directory)", "choose another run_dir"),
        {"run_dir": "FOLDER/corpus.jsonl/run"},
        worlds=(1, 2),
    ),
    "world size that does not match the layout": Mistake(
        ("tensor 1 * pipeline 4 * context 1 = 4 does not divide the world size", "valid numbers of ranks: 4"),
        {"student__layout": {"pipeline": 4}},
        worlds=(1, 2),
    ),
}
CASES = [(name, world) for name, mistake in MISTAKES.items() for world in mistake.worlds]


def sound_config(stage: str, folder: Path) -> dict[str, Any]:
    """The configuration of a run in a folder with data and teacher."""
    if stage == "distill":
        return runs.distill_config(Fixtures(folder), folder / "run", folder / "teacher")
    return runs.adapt_config(Fixtures(folder), folder / "run")


def with_mistake(mistake: Mistake, folder: Path) -> dict[str, Any]:
    """The configuration of the same run with the mistake."""
    wrong = runs.changed(sound_config(mistake.stage, folder), **mistake.changes)
    return json.loads(json.dumps(wrong).replace("FOLDER", str(folder)))


def set_up(fixtures: Fixtures, teacher: Path, folder: Path) -> None:
    """Copies data and teacher into a folder."""
    for file in fixtures.folder.iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    shutil.copytree(teacher, folder / "teacher")


@pytest.fixture(scope="module")
def begun(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """For each stage a folder with data, teacher and a run of one step; the run is made once, and always lies there."""
    folder = tmp_path_factory.mktemp("begun")

    def begun(stage: str) -> Path:
        here, untouched = folder / "here", folder / stage
        if here.exists():
            shutil.rmtree(here)
        if not untouched.exists():
            here.mkdir()
            set_up(fixtures, teacher, here)
            runs.train(pool, stage, runs.changed(sound_config(stage, here), train__steps=1))
            here.rename(untouched)
        return shutil.copytree(untouched, here)

    return begun


def assert_one_line(stderr: str, mistake: Mistake, folder: Path) -> None:
    (line,) = stderr.splitlines()
    assert line.startswith("capgap: error: ")
    for part in mistake.says:
        assert part.replace("FOLDER", str(folder)) in line


@pytest.mark.parametrize("name, world", CASES, ids=[f"{name}-{world}" for name, world in CASES])
def test_one_line_exit_code_2_and_no_traces(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, name: str, world: int
) -> None:
    mistake = MISTAKES[name]
    set_up(fixtures, teacher, tmp_path)
    wrong = with_mistake(mistake, tmp_path)
    mistake.spoil(tmp_path)
    words = [mistake.stage, "--config", runs.write_config(wrong, tmp_path / "run.yaml")]
    before = runs.files_of(tmp_path)
    ranks = pool.run(main, words, world=world, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [2] * world
    assert_one_line(ranks[0].stderr, mistake, tmp_path)
    for number, rank in enumerate(ranks[1:], 1):
        # Ranks that have not met cannot know that the first one tells the same.
        alone = ranks[0].stderr.replace("error: ", f"error: rank {number} on {socket.gethostname()}: ", 1)
        assert rank.stdout == "" and rank.stderr in ("", alone)
    assert runs.files_of(tmp_path) == before
    assert not Path(wrong["run_dir"]).exists()


@pytest.mark.parametrize("name", [name for name in MISTAKES if name != "run_dir not writable"])
def test_a_run_that_is_there_stays_as_it_was(pool: WorkerPool, begun: Callable[[str], Path], name: str) -> None:
    mistake = MISTAKES[name]
    folder = begun(mistake.stage)
    wrong = with_mistake(mistake, folder)
    mistake.spoil(folder)
    words = [mistake.stage, "--config", runs.write_config(wrong, folder / "run.yaml")]
    before = runs.files_of(folder)
    ranks = pool.run(main, words, world=mistake.worlds[0], initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [2] * len(ranks)
    (line,) = ranks[0].stderr.splitlines()  # perhaps that the run was begun with something else
    assert line.startswith("capgap: error: ")
    assert runs.files_of(folder) == before


def test_a_run_of_another_shape_is_not_continued(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "run", train__steps=1))
    before = runs.files_of(tmp_path / "run")
    config = runs.adapt_config(fixtures, tmp_path / "run", student__model__ffn=64)
    (rank,) = runs.run_stage(pool, "adapt", config)
    assert rank.value == 2
    (line,) = rank.stderr.splitlines()
    assert f"run_dir: {tmp_path}/run holds a checkpoint with ffn 48, this student has ffn 64; choose another" in line
    assert runs.files_of(tmp_path / "run") == before


@pytest.mark.slow("starts two interpreters")
def test_real_processes_leave_with_code_2(fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    """What only shows outside the pool: warnings of imports, destructors, the launcher's view."""
    mistake = MISTAKES["truncated .bin"]
    set_up(fixtures, teacher, tmp_path)
    wrong = with_mistake(mistake, tmp_path)
    mistake.spoil(tmp_path)
    wrong["run_dir"] = str(tmp_path / "runs" / "of" / "mine")
    words = ["adapt", "--config", runs.write_config(wrong, tmp_path / "run.yaml")]
    with job(words, 2, tmp_path / "job", cold=True) as ranks:
        assert ranks.wait() == [2, 2]
        assert_one_line(ranks.stderr(), mistake, tmp_path)
        assert ranks.stdout() == ranks.stdout(1) == ranks.stderr(1) == ""
        assert ranks.left_behind() == []
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_another_tokenizer(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    large_tokenizer(tmp_path)
    changes = {"data__tokenizer": str(tmp_path / "large.model"), "student__model__vocab": 400}
    (rank,) = runs.run_stage(pool, "distill", runs.distill_config(fixtures, tmp_path / "run", teacher, **changes))
    assert rank.value == 2
    files = (fixtures.folder / "tokenizer.model", tmp_path / "large.model")
    theirs, ours = (open_tokenizer(str(file)).fingerprint[:12] for file in files)
    assert f"trained with tokenizer {files[0]} ({theirs}), but data.tokenizer is {files[1]} ({ours})" in rank.stderr


def test_what_is_wrong_in_several_places_is_told_at_once(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"data__tokenizer": str(tmp_path / "none.model"), "data__valid": [str(tmp_path / "none")]}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes, student__layout={"tensor": 3})
    ranks = runs.run_stage(pool, "adapt", config, world=3)
    assert [rank.value for rank in ranks] == [2, 2, 2]
    lines = ranks[0].stderr.splitlines()
    for expected in (
        "student.layout.tensor: 3 ",
        "none.model does not exist",
        f"data.valid: dataset {tmp_path / 'none'}",
    ):
        assert sum(expected in line for line in lines) == 1, lines
    assert not (tmp_path / "run").exists()


def test_a_key_that_is_missing_is_told_in_one_line(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """The key's description has several."""
    (rank,) = runs.run_stage(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "run", data__train=None))
    (line,) = rank.stderr.splitlines()
    assert rank.value == 2 and "data.train: required by adapt; expected a list" in line and "\\n" not in line


def test_what_an_evaluation_leaves_out_is_told(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    changes = {"student__model": None, "student__checkpoint": str(teacher), "train__eval_batches": None}
    config = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    (rank,) = runs.run_stage(pool, "evaluate", config)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    held_out = indexed.inspect(config["data"]["valid"][0], None, None).tokens
    assert found["tokens"] + found["tokens_left_out"] == held_out - 1, "the first token is predicted from nothing"
    assert 0 < found["tokens_left_out"] < config["data"]["sequence_length"]
    assert f"{found['tokens_left_out']} tokens at the ends of the datasets do not fill a row" in rank.stdout
