"""A run that is killed, signalled and damaged again and again, by a schedule that a seed decides."""

import os
import random
import re
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import runs
from tests.support.processes import Job, job

WORLD = 2
EVERY = 2
"""Steps between checkpoints."""
STEPS_A_START = 9
"""More than a start takes until its fault, with what it repeats; so the run does not end before the schedule does."""
KINDS = ("SIGKILL", "SIGTERM", "SIGUSR1", "flip", "cut", "delete")


@dataclass(frozen=True)
class Fault:
    """One end of a start."""

    kind: str
    """A signal to one rank, or what happens to a file of the newest checkpoint after all ranks were killed."""
    rank: int
    steps: int
    """Steps of this start before it; always enough for two checkpoints."""
    saving: bool
    """Whether it waits for a checkpoint that is being written."""
    draw: float
    """Decides which file and which byte, between 0 and 1."""


def schedule(seed: int, count: int) -> list[Fault]:
    """Faults of all kinds, half of them in saves."""
    chance = random.Random(seed)
    return [
        Fault(
            chance.choice(KINDS),
            chance.randrange(WORLD),
            chance.randint(2 * EVERY, 3 * EVERY),
            chance.random() < 0.5,
            chance.random(),
        )
        for _ in range(count)
    ]


def config(
    fixtures: runs.Fixtures, run_dir: Path, count: int, teacher: Path | None = None, *, beside: bool = False
) -> dict[str, Any]:
    """Two ranks with dropout, long enough for a number of faults: replicas, or with a teacher two pipeline stages.

    Args:
        material: to read.
        run_dir: of the run.
        count: faults.
        teacher: a checkpoint to distil; None trains on text alone.
        beside: whether checkpoints are written while training goes on.
    """
    changes = {"train__steps": STEPS_A_START * count, "train__dropout": 0.1, "optimizer__schedule": "constant"}
    changes |= {"checkpoint__every": EVERY, "checkpoint__async_save": beside, "train__eval_every": 5}
    changes |= {"train__log_every": 1}  # this start's steps are read off what it says
    if teacher is None:
        return runs.adapt_config(fixtures, run_dir, **changes)
    return runs.distill_config(fixtures, run_dir, teacher, student__layout={"pipeline": 2}, **changes)


def stage_of(settings: dict[str, Any]) -> str:
    """The stage that settings of `config` are for."""
    return "distill" if "teacher" in settings else "adapt"


def endure(settings: dict[str, Any], faults: list[Fault], folder: Path, limit: float = 120.0) -> Counter[str]:
    """Starts the run once for each fault and then to its end. Fails where a start hangs or loses a whole checkpoint.

    Args:
        settings: of `config`.
        faults: of `schedule`.
        folder: for what the ranks say.
        limit: seconds that a start may take to its fault, and to its end after it.

    Returns:
        How many faults of each kind there were, and under "in a save" those that met one.
    """
    run_dir, words = Path(settings["run_dir"]), [stage_of(settings), "--config", runs.write_config(settings)]
    met: Counter[str] = Counter()
    whole = 0
    for number, fault in enumerate(faults):
        with job(words, WORLD, folder / str(number)) as ranks:
            ranks.wait_until(lambda: _far_enough(ranks, run_dir, whole, fault), limit)  # noqa: B023 (called at once)
            if fault.saving:
                ranks.wait_until(lambda: _unfinished(run_dir), limit)
            met["in a save"] += _unfinished(run_dir)
            _strike(ranks, fault)
            ranks.wait(limit)
            assert ranks.left_behind() == [], fault
            _assert_resumed(ranks, whole)
        whole = _latest(run_dir)
        if fault.kind in ("flip", "cut", "delete"):
            whole = _damage(run_dir, fault)
        met[fault.kind] += 1
        print(f"fault {number} met, to go on from step {whole}", flush=True)
        shutil.rmtree(folder / str(number))
    with job(words, WORLD, folder / "last") as ranks:
        assert ranks.wait(10 * limit) == [0] * WORLD, ranks.stderr()
        _assert_resumed(ranks, whole)
    return met


def _strike(ranks: Job, fault: Fault) -> None:
    if fault.kind.startswith("SIG"):
        ranks.signal(signal.Signals[fault.kind], [fault.rank])
    else:
        ranks.signal(signal.SIGKILL)


def _assert_resumed(ranks: Job, whole: int) -> None:
    """The start went on from the last whole checkpoint, or from a newer one that was complete and not yet named."""
    found = re.search(r"resumed from \S+: step (\d+) of", ranks.stdout())
    assert (int(found[1]) if found else 0) >= whole, f"lost step {whole}: {ranks.stdout()}"


def _far_enough(ranks: Job, run_dir: Path, whole: int, fault: Fault) -> bool:
    """Whether a start has done its steps, and finished two checkpoints that damage may find.

    metrics.jsonl cannot tell: until the start has loaded its checkpoint, it holds steps of the start before.
    """
    done = re.findall(r"^step (\d+)/", ranks.stdout(), re.M)
    return bool(done) and int(done[-1]) >= whole + fault.steps and _latest(run_dir) >= whole + 2 * EVERY


def _latest(run_dir: Path) -> int:
    """The step that `latest` names, 0 where there is none yet."""
    pointer = run_dir / "latest"
    return int(pointer.read_text().strip().removeprefix("step_")) if pointer.exists() else 0


def _unfinished(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".*.incomplete"))


def _damage(run_dir: Path, fault: Fault) -> int:
    """Damages one file of the newest checkpoint; returns the step of the one before it."""
    folders = {int(path.name[5:]): path for path in (run_dir / "checkpoints").glob("step_*") if path.name[5:].isdigit()}
    *_, before, newest = sorted(folders)
    files = sorted(path for path in folders[newest].rglob("*") if path.is_file())
    file = files[int(fault.draw * len(files))]
    size = file.stat().st_size
    if fault.kind == "delete":
        file.unlink()
    elif fault.kind == "cut":
        os.truncate(file, int(fault.draw * size))
    else:
        content = bytearray(file.read_bytes())
        content[int(fault.draw * size)] ^= 1 << int(fault.draw * 8)
        file.write_bytes(content)
    return before
