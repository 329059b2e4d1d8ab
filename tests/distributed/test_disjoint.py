"""A teacher with ranks of its own: the numbers of one rank, resuming, signals, and what happens when it is lost."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.cli import main
from tests.end_to_end.test_signal_phases import signal_in
from tests.support import dense, runs
from tests.support.pool import WorkerError, WorkerPool
from tests.support.processes import LEAVE, job
from tests.support.runs import Fixtures

TOLERANCE = 1e-5
# name: (ranks, of them the teacher's, its layout, the student's layout, batches ahead)
PLACES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any], int]] = {
    "1_and_1": (2, 1, {}, {}, 1),
    "pp2_and_tp2": (4, 2, {"pipeline": 2}, {"tensor": 2, "sequence": True}, 1),
    "tp2_and_pp2": (4, 2, {"tensor": 2, "sequence": True}, {"pipeline": 2, "virtual_pipeline": 2}, 2),
    "dp2_and_dp2": (4, 2, {}, {}, 3),
}
PAIRS = [
    {"student_layer": 4, "teacher_layer": 1},
    {"student_layer": 1, "teacher_layer": 4, "kind": "cosine"},
]


def configuration(fixtures: Fixtures, run_dir: Path, teacher: Path, place: str, **changes: Any) -> dict[str, Any]:
    _, ranks, of_teacher, of_student, ahead = PLACES[place]
    fixed = {"teacher__placement": "disjoint", "teacher__ranks": ranks, "teacher__ahead": ahead}
    fixed |= {"teacher__layout": of_teacher, "student__layout": of_student, "teacher__micro_batch": 1}
    return runs.distill_config(fixtures, run_dir, teacher, **{**fixed, **changes})


def one_rank(pool: WorkerPool, fixtures: Fixtures, run_dir: Path, teacher: Path, **changes: Any) -> list[dict]:
    return runs.metrics(runs.train(pool, "distill", runs.distill_config(fixtures, run_dir, teacher, **changes)))


@pytest.mark.parametrize("place", ["1_and_1", "pp2_and_tp2", "tp2_and_pp2", "dp2_and_dp2"])
def test_the_numbers_of_one_rank(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, place: str
) -> None:
    expected = one_rank(pool, fixtures, tmp_path / "one", teacher)
    raw = configuration(fixtures, tmp_path / place, teacher, place)
    found = runs.metrics(runs.train(pool, "distill", raw, PLACES[place][0]))
    assert [entry["step"] for entry in found] == [1, 2, 3, 4, 4]
    for mine, theirs in zip(found, expected, strict=True):
        runs.assert_close(mine, theirs, TOLERANCE, place)


def test_matched_layers_cross_the_bridge(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    changes = {"objective__matching": PAIRS, "optimizer__schedule": "constant", "optimizer__epsilon": 1.0e-4}
    raw = configuration(fixtures, tmp_path / "run", teacher, "tp2_and_pp2", data__valid=None, **changes)
    run_dir = runs.train(pool, "distill", raw, 4)
    for mine, theirs in zip(runs.steps_of(run_dir), dense.steps(pool, "distill", raw), strict=True):
        del mine["lr"]
        runs.assert_close(mine, theirs, TOLERANCE)


def test_resuming_is_exact_and_any_placement_goes_on(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": 5, "checkpoint__every": 2, "checkpoint__keep": 3, "train__eval_every": 2}
    place, world = "tp2_and_pp2", 4
    dropped = {**changes, "train__dropout": 0.1}
    whole = runs.train(pool, "distill", configuration(fixtures, tmp_path / "whole", teacher, place, **dropped), world)
    again = runs.rewind(whole, tmp_path / "again", step=2)
    runs.train(pool, "distill", configuration(fixtures, again, teacher, place, **dropped), world)
    assert runs.metrics(again) == runs.metrics(whole)
    plain = runs.train(pool, "distill", configuration(fixtures, tmp_path / "plain", teacher, place, **changes), world)
    other = runs.rewind(plain, tmp_path / "other", step=2)
    runs.train(pool, "distill", runs.distill_config(fixtures, other, teacher, **changes))
    for mine, theirs in zip(runs.metrics(other), runs.metrics(plain), strict=True):
        runs.assert_close(mine, theirs, TOLERANCE)
    done = runs.run_stage(pool, "distill", configuration(fixtures, whole, teacher, place, **dropped), world)
    assert [rank.value for rank in done] == [0] * world and "nothing to do" in done[0].stdout


def test_a_damaged_checkpoint_is_skipped_by_both(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    """Only the student reads its checkpoints; the teacher goes on from where that leads."""
    raw = configuration(fixtures, tmp_path / "run", teacher, "1_and_1", data__valid=None, checkpoint__every=2)
    run_dir = runs.train(pool, "distill", raw, 2)
    expected = runs.metrics(run_dir)
    file = next((run_dir / "checkpoints" / "step_4").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    ranks = runs.run_stage(pool, "distill", raw, 2)
    assert [rank.value for rank in ranks] == [0, 0]
    assert "step_4 is damaged and skipped" in ranks[0].stderr
    assert runs.metrics(run_dir) == expected


def test_what_stops_one_world_stops_both(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    """A damaged teacher, and a run directory that only the student's first rank looks at."""
    damaged = tmp_path / "damaged"
    newest = (teacher / "latest").read_text().strip()
    (damaged / "checkpoints").mkdir(parents=True)
    os.symlink(teacher / "latest", damaged / "latest")
    os.mkdir(damaged / "checkpoints" / newest)
    for file in (teacher / "checkpoints" / newest).iterdir():
        if file.suffix == ".distcp":
            (damaged / "checkpoints" / newest / file.name).write_bytes(file.read_bytes()[:100])
        else:
            os.symlink(file, damaged / "checkpoints" / newest / file.name)
    occupied = tmp_path / "occupied"
    occupied.write_text("no folder")
    for teacher_dir, run_dir in ((damaged, tmp_path / "run"), (teacher, occupied / "run")):
        raw = configuration(fixtures, run_dir, teacher_dir, "pp2_and_tp2")
        words = ["distill", "--config", runs.write_config(raw, tmp_path / "run.yaml")]
        ranks = pool.run(main, words, world=4, initialise=False, capture=True)
        assert [rank.value for rank in ranks] == [2] * 4
        (line,) = ranks[0].stderr.splitlines()
        assert line.startswith("capgap: error: ") and str(damaged if teacher_dir == damaged else run_dir) in line
        assert not any(rank.stderr for rank in ranks[1:])
        assert not (tmp_path / "run").exists()


def test_what_is_not_finite_stops_both(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    changes = {"train__steps": 9, "optimizer__lr": 1.0e38, "optimizer__clip_norm": 0.0, "data__valid": None}
    raw = configuration(fixtures, tmp_path / "run", teacher, "tp2_and_pp2", **changes)
    ranks = runs.run_stage(pool, "distill", raw, world=4)
    assert [rank.value for rank in ranks] == [2] * 4
    (line,) = ranks[0].stderr.splitlines()
    assert "is not finite; weights and optimizer are as after step" in line
    assert not any(rank.stderr for rank in ranks[1:])


@pytest.mark.slow("four ranks are stopped, go on, and are compared with ranks that never were")
@pytest.mark.parametrize("rank", [0, 3], ids=["student", "teacher"])
def test_a_signal_to_one_rank_stops_all_at_a_step(fixtures: Fixtures, teacher: Path, tmp_path: Path, rank: int) -> None:
    changes = {"train__steps": 2000, "data__valid": None}
    raw = configuration(fixtures, tmp_path / "run", teacher, "pp2_and_tp2", **changes)
    with job(["distill", "--config", runs.write_config(raw)], 4, tmp_path / "job") as ranks:
        ranks.wait_until(lambda: len(runs.steps_of(tmp_path / "run")) >= 3)
        ranks.signal(signal.SIGTERM, [rank])
        assert ranks.wait() == [0] * 4, [ranks.stderr(r) for r in range(4)]
        done = len(runs.steps_of(tmp_path / "run"))
        assert f"stopped by SIGTERM after step {done} of 2000" in ranks.stdout()
        assert all(ranks.stderr(r) == "" for r in range(4)) and ranks.left_behind() == []
    assert runs.checkpoints(tmp_path / "run") == [f"step_{done}"]


@pytest.mark.parametrize("every, stopped", [(2, 2), (0, 5)], ids=["on the way", "the last one"])
def test_a_signal_in_an_evaluation_stops_the_teacher_too(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, every: int, stopped: int
) -> None:
    """Of an evaluation the teacher knows nothing, and works ahead; after the last step it has left."""
    changes = {"train__steps": 5, "train__eval_every": every}
    unbroken = configuration(fixtures, tmp_path / "unbroken", teacher, "1_and_1", **changes)
    expected = runs.metrics(runs.train(pool, "distill", unbroken, 2))
    raw = configuration(fixtures, tmp_path / "run", teacher, "1_and_1", **changes)
    words = ["distill", "--config", runs.write_config(raw)]
    work = partial(signal_in, "training.evaluate micro_batches", signal.SIGTERM, words, rank=0)
    ranks = pool.run(work, world=2, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [0, 0], ranks
    assert f"stopped by SIGTERM after step {stopped} of 5" in ranks[0].stdout
    assert runs.metrics(tmp_path / "run") == expected[:stopped]
    assert runs.metrics(runs.train(pool, "distill", raw, 2)) == expected


@pytest.mark.slow("waits until the others give a lost rank up")
@pytest.mark.parametrize(
    "number, place",
    [(signal.SIGKILL, "pp2_and_tp2"), (signal.SIGSTOP, "tp2_and_pp2")],
    ids=["dead", "stalled"],
)
def test_a_lost_teacher_rank_stops_all_in_time(
    fixtures: Fixtures, teacher: Path, tmp_path: Path, number: signal.Signals, place: str
) -> None:
    """Rank 3 is lost. Under tp2_and_pp2 rank 0 knows nothing of the teacher: it waits for rank 1, which waits for it;
    rank 2 waits for its half of a matrix product. Each says all the same which transfer waited, and for whom."""
    limit = 20  # long enough for ranks that start slowly
    changes = {"train__steps": 2000, "data__valid": None, "runtime__timeout_seconds": limit}
    raw = configuration(fixtures, tmp_path / "run", teacher, place, **changes)
    with job(["distill", "--config", runs.write_config(raw)], 4, tmp_path / "job") as ranks:
        ranks.wait_until(lambda: len(runs.steps_of(tmp_path / "run")) >= 3)
        began = time.monotonic()
        ranks.signal(number, [3])
        codes = ranks.wait_for(range(3), 5 * limit)
        assert time.monotonic() - began < 2 * limit + LEAVE, "within twice the time-out, and the time to leave"
        assert all(code not in (0, None) for code in codes), codes
        lost = r"rank 3 on \S+, last heartbeat in .+: dead or stalled"
        # A rank that stands still between two turns is missed in the agreement on the end of a step.
        transfer = r"the transfer of the teacher's hidden states after the last layer from rank \d to rank \d"
        waited = f"{transfer}|the end-of-step all-reduce over all ranks"
        for said in map(ranks.stderr, range(3)):
            assert re.search(lost, said) and re.search(waited, said), said
    assert not (tmp_path / "run" / "latest").exists()


def kill_myself_after(step: int, rank: int, words: list[str]) -> int:
    """Runs a command on ranks of which one student rank dies by SIGKILL after a step."""
    from megatron_capgap.training import loop

    report = loop._log_step

    def report_and_die(run: loop.TrainingRun, done: int, *rest: Any) -> None:
        report(run, done, *rest)
        if done == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)

    loop._log_step = report_and_die
    try:
        return main(words)
    finally:
        loop._log_step = report


def test_a_killed_student_rank_ends_the_teacher_too(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": 50, "runtime__timeout_seconds": 40}
    raw = configuration(fixtures, tmp_path / "run", teacher, "pp2_and_tp2", **changes)
    work = partial(kill_myself_after, 2, 1, ["distill", "--config", runs.write_config(raw)])
    with pytest.raises(WorkerError) as failed:
        pool.run(work, world=4, initialise=False)
    assert sorted(failed.value.failures) == [0, 1, 2, 3]
    assert not any("no answer" in failure.reason for failure in failed.value.failures.values()), failed.value
