"""A sweep from the grid to the law: records, kills, restarts, and runs that are as those of the door."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.law import records
from megatron_capgap.law.sweep import SECTIONS
from tests.support.processes import ROOT, environment, group_lives, wait_for
from tests.support.runs import STUDENT, TEACHER, Fixtures, files_of, metrics, train_apart
from tools import make_sweep

SMALL = {**STUDENT, "layers": 2}


def grid(fixtures: Fixtures, out: Path, **changes: Any) -> dict[str, Any]:
    """Two teachers, two students, one of them with a fixed start and cut out of a teacher as well: 2 + 4 + 1 + 2 + 3
    runs of a few steps."""
    found = {
        "out": str(out),
        "common": {
            "device": "cpu",
            "data": fixtures.data,
            "train": {"global_batch": 8, "micro_batch": 4, "eval_batches": 2},
            "optimizer": {"lr": 3.0e-3, "warmup_fraction": 0.0},
            "runtime": {"timeout_seconds": 60, "tensorboard": False},
        },
        "teach": {"train": {"steps": 6}},
        "start": {"train": {"steps": 2}},
        "prune": {"prune": {"batches": 2}},
        "distill": {"train": {"steps": 5}, "checkpoint": {"every": 2}},
        "teachers": {"t1": {"model": TEACHER}, "t2": {"model": {**TEACHER, "ffn": 160}, "data": {"valid": []}}},
        "students": {"s1": {"model": SMALL}, "s2": {"model": STUDENT}},
        "rows": [
            {"init": "random", "seeds": [1], "labels": False},
            {"init": "fixed", "students": ["s1"], "seeds": [1], "labels": False},
            {"init": "pruned", "students": ["s1"], "teachers": ["t1"], "seeds": [1]},
        ],
    }
    return found | changes


@contextmanager
def sweep(file: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """make_sweep in a process of its own; its ranks end with it."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "make_sweep.py"), str(file), *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def call(file: Path, *words: str) -> tuple[int, str, str]:
    with sweep(file, *words) as process:
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err


def wait_in(process: subprocess.Popen[str], condition: Callable[[], bool], what: str) -> None:
    """Until something holds of a sweep that runs."""
    wait_for(lambda: condition() or process.poll() is not None, 240, what, every=0.01)
    assert process.poll() is None, f"the sweep ended before {what}: {process.communicate()}"


def finished(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob("runs/*/record.json"))


@pytest.fixture(scope="module")
def killed(fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep that was killed in the middle of a run, and then called again, for two runs at a time."""
    folder = tmp_path_factory.mktemp("sweep")
    out, file = folder / "work", folder / "grid.yaml"
    file.write_text(yaml.safe_dump(grid(fixtures, out)))
    with sweep(file, "--run") as process:
        wait_in(process, lambda: len(finished(out)) == 2, "two records")
        third = out / "runs" / "random-s2-t1-seed1"
        wait_in(process, (third / "metrics.jsonl").is_file, "the third student's first step")
        process.kill()
        process.wait()
        wait_for(lambda: not group_lives(process.pid), 60, "the end of the ranks that the sweep started")
        before = {path.name: files_of(path) for path in (out / "runs").iterdir()}
    done = finished(out)
    code, said, complained = call(file, "--run", "--jobs", "2")
    assert code == 0, said + complained
    return {"out": out, "file": file, "done": done, "before": before, "said": said}


@pytest.mark.slow("its fixture trains a grid, killed half-way")
def test_only_what_was_missing_ran(killed: dict[str, Any]) -> None:
    out = killed["out"]
    ran = re.findall(r"^\[\d+/12\] \w+ (\S+): done", killed["said"], flags=re.M)
    finished_before = {"teacher-t1", "teacher-t2", *killed["done"]}
    names = {path.stem for path in (out / "configs").iterdir()}
    assert len(killed["done"]) >= 2 and set(ran) == names - finished_before and len(ran) == len(set(ran))
    assert f"{len(finished_before)} of 12 runs are already finished" in killed["said"]
    for name in finished_before:
        assert files_of(out / "runs" / name) == killed["before"][name], name


@pytest.mark.slow("its fixture trains a grid, killed half-way")
def test_records_are_complete(killed: dict[str, Any]) -> None:
    found = records.read([killed["out"] / "records.jsonl"])
    assert len(found) == 8 and "8 of 8 records" in killed["said"]
    assert {(each.init, each.tokens, each.teacher_tokens) for each in found} == {
        ("random", 5 * 8 * 32, 6 * 8 * 32),
        ("fixed", 5 * 8 * 32, 6 * 8 * 32),
        ("pruned", 5 * 8 * 32, 6 * 8 * 32),
    }
    assert len({each.config_hash for each in found}) == 8
    assert {each.teacher_seed for each in found} == {1234}
    (taught,) = (each for each in found if each.init == "pruned" and each.taught)
    (alone,) = (each for each in found if not each.taught)
    assert (alone.init, alone.objective) == ("pruned", "1 cross_entropy")
    assert alone.valid_loss != taught.valid_loss and alone.flops < taught.flops
    log = (killed["out"] / "logs" / "labels-pruned-s1-t1-seed1.log").read_text()
    assert "the objective does not use the teacher: it is not loaded" in log
    # t1 was evaluated at its end; t2 had no held-out text.
    own = metrics(killed["out"] / "runs" / "teacher-t1")[-1]["valid_loss"]
    assert {each.teacher_params: each.teacher_valid_loss for each in sorted(found, key=lambda r: r.teacher_params)} == {
        min(each.teacher_params for each in found): own,
        max(each.teacher_params for each in found): None,
    }


@pytest.mark.slow("its fixture trains a grid, killed half-way")
def test_a_run_of_the_sweep_is_a_run_of_the_door(killed: dict[str, Any], tmp_path: Path) -> None:
    """The last run of its processes, after others, equals one in a process of its own to the last digit."""
    config = yaml.safe_load((killed["out"] / "configs" / "fixed-s1-t2-seed1.yaml").read_text())
    inside = metrics(Path(config["run_dir"]))
    train_apart("distill", {**config, "run_dir": str(tmp_path / "alone")})
    assert inside == metrics(tmp_path / "alone")


@pytest.mark.slow("its fixture trains a grid, killed half-way")
def test_a_finished_sweep_runs_nothing(killed: dict[str, Any]) -> None:
    before = files_of(killed["out"] / "runs")
    code, said, _ = call(killed["file"], "--run")
    assert code == 0 and "12 of 12 runs are already finished" in said
    assert files_of(killed["out"] / "runs") == before


@pytest.mark.slow("its fixture trains a grid, killed half-way")
def test_a_changed_grid_is_refused(killed: dict[str, Any], fixtures: Fixtures, tmp_path: Path) -> None:
    changed = grid(fixtures, killed["out"])
    changed["distill"]["train"]["steps"] = 7
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(changed))
    before = files_of(killed["out"] / "runs")
    code, _, complained = call(file, "--run")
    assert code == 2 and "random-s1-t1-seed1: was started with another configuration" in complained
    assert "(train differ)" in complained and files_of(killed["out"] / "runs") == before
    assert call(killed["file"])[0] == 0  # the configurations of the true grid again


def array_task(out: Path, task: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """One task of the second phase, by the batch script, with what is found in a folder before SLURM's commands."""
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "7"}
    variables |= {**environment(), "SLURM_SUBMIT_DIR": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(out / "slurm" / "array.sbatch"), str(out / "slurm" / "phase_1.txt")],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow("its fixture trains a grid, killed half-way")
def test_an_array_task_runs_its_line(killed: dict[str, Any], tmp_path: Path) -> None:
    """The batch script with an srun that starts one rank here: each task finds its run, which is finished already."""
    (tmp_path / "srun").write_text('#!/bin/sh\nwhile case $1 in -*) ;; *) false ;; esac; do shift; done; exec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    lines = (killed["out"] / "slurm" / "phase_1.txt").read_text().splitlines()
    assert len(lines) == 7
    done = array_task(killed["out"], task=5, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(lines[5].split()[1]).stem == "fixed-s1-t2-seed1"
    assert "resumed from" in done.stdout and "fixed-s1-t2-seed1" in done.stdout and "nothing to do" in done.stdout
    cut = array_task(killed["out"], task=6, folder=tmp_path)
    assert cut.returncode == 0 and Path(lines[6].split()[1]).stem == "prune-s1-t1", cut.stderr


@pytest.mark.slow("its fixture trains a grid, killed half-way")
def test_a_lost_record_is_written_anew(killed: dict[str, Any]) -> None:
    """The run itself is over: it is opened, finds nothing to do, and leaves the same record."""
    path = killed["out"] / "runs" / "fixed-s1-t2-seed1" / "record.json"
    before = path.read_text()
    path.unlink()
    code, said, _ = call(killed["file"], "--run")
    assert code == 0 and "11 of 12 runs are already finished" in said and path.read_text() == before


@pytest.mark.slow("a sweep starts, is stopped and goes on")
def test_sigterm_saves_the_current_run_and_stops(fixtures: Fixtures, tmp_path: Path) -> None:
    long = grid(fixtures, tmp_path / "work", rows=[{"init": "random", "students": ["s1"], "seeds": [1]}])
    long["teach"]["train"]["steps"] = 2000
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(long))
    first = tmp_path / "work" / "runs" / "teacher-t1"
    with sweep(tmp_path / "grid.yaml", "--run") as process:
        wait_in(process, lambda: len(metrics(first)) > 2, "the teacher's third step")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 130 and "stopped; rerun the same command to continue" in said
    assert 2 < json.loads((run_directory.latest(first) / metadata.CAPGAP_METADATA_FILE).read_text())["step"] < 2000
    assert [path.name for path in (tmp_path / "work" / "runs").iterdir()] == ["teacher-t1"]
    refused = array_task(tmp_path / "work", task=0, folder=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.startswith(f"array.sbatch: error: {first} is not finished; ")


def test_keys_that_are_no_configuration_are_refused(fixtures: Fixtures, tmp_path: Path) -> None:
    wrong = grid(fixtures, tmp_path / "work")
    wrong["distill"]["train"]["step"] = 7
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(wrong))
    code, _, complained = call(tmp_path / "grid.yaml")
    assert code == 2 and "train.step: unknown key; did you mean train.steps?" in complained
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("section", "given", "key", "message"),
    [
        ("common", {"data": {"tokenizer": "work/t.model"}}, "data.tokenizer", "tokenizer work/t.model does not exist"),
        ("common", {"data": {"train": ["work/a"]}}, "data.train", "dataset work/a: work/a.bin does not exist"),
        ("teachers", {"t1": {"checkpoint": "work/t"}}, "t1.checkpoint", "work/t: no such checkpoint"),
    ],
    ids=["tokenizer", "dataset", "teacher"],
)
def test_what_runs_read_is_there_before_they_begin(
    fixtures: Fixtures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    section: str,
    given: dict[str, Any],
    key: str,
    message: str,
) -> None:
    """A grid's paths begin in the current folder: called in another one, no run of it could begin."""
    monkeypatch.chdir(tmp_path)
    wrong = grid(fixtures, Path("sweep"), rows=[{"init": "random", "students": ["s1"], "seeds": [1]}])
    for name, value in given.items():
        wrong[section][name] = {**wrong[section][name], **value}
    Path("grid.yaml").write_text(text := yaml.safe_dump(wrong))
    assert make_sweep.main(["grid.yaml", "--run"]) == 2
    said = capsys.readouterr().err
    line = int(said.split(":")[3])
    assert f"{key.rpartition('.')[2]}:" in text.splitlines()[line - 1]
    assert said.startswith(f"make_sweep: error: grid.yaml:{line}: {section}.{key}: {message}") and said.count("\n") == 1
    assert f"; the grid's paths are relative to the current folder, {tmp_path}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]
    # A plan may be made before the data are, and says what is missing; so does the script that submits it.
    assert make_sweep.main(["grid.yaml"]) == 0
    assert f"note: before these runs can start: grid.yaml:{line}: " in capsys.readouterr().out
    refused = subprocess.run(["bash", "sweep/slurm/submit.sh"], capture_output=True, text=True)
    assert refused.returncode == 2 and f"error: {tmp_path / 'work'}/" in refused.stderr, refused.stderr


def test_what_is_there_is_submitted(fixtures: Fixtures, tmp_path: Path) -> None:
    """With an sbatch that takes everything: an array a phase."""
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid(fixtures, tmp_path / "sweep")))
    assert make_sweep.main([str(tmp_path / "grid.yaml")]) == 0
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", str(tmp_path / "sweep" / "slurm" / "submit.sh")]
    done = subprocess.run(words, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "phase_0: job 7, 3 runs\nphase_1: job 7, 7 runs\nphase_2: job 7, 2 runs\n"


def test_the_help_lists_every_key_of_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_sweep.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {key}: " in said for key in SECTIONS)


@pytest.mark.slow("a sweep of several runs")
def test_a_failed_run_leaves_out_those_behind_it(fixtures: Fixtures, tmp_path: Path) -> None:
    wrong = grid(fixtures, tmp_path / "work", rows=[{"init": "random", "students": ["s1"], "seeds": [1]}])
    wrong["teachers"]["t1"] = {"model": {**TEACHER, "heads": 7}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(wrong))
    code, said, _ = call(tmp_path / "grid.yaml", "--run")
    assert code == 1
    assert "teacher-t1: failed with exit code 2" in said and "-s1-t1-seed1: skipped, because teacher-t1 failed" in said
    assert json.loads((tmp_path / "work" / "records.jsonl").read_text())["teacher_params"] > 0
    assert "heads" in (tmp_path / "work" / "logs" / "teacher-t1.log").read_text()
