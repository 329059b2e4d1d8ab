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


def config(material: runs.Material, run_dir: Path, count: int) -> dict[str, Any]:
    """Two data-parallel ranks with dropout, long enough for a number of faults."""
    changes = {"train__steps": STEPS_A_START * count, "train__dropout": 0.1, "checkpoint__every": EVERY}
    return runs.adapt_config(material, run_dir, optimizer__schedule="constant", **changes)


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
    run_dir, words = Path(settings["run_dir"]), ["adapt", "--config", runs.write_config(settings)]
    met: Counter[str] = Counter()
    whole = 0
    for number, fault in enumerate(faults):
        with job(words, WORLD, folder / str(number)) as ranks:
            ranks.wait_until(lambda: _last_step(run_dir) >= whole + fault.steps, limit)  # noqa: B023 (called at once)
            if fault.saving:
                ranks.wait_until(lambda: _unfinished(run_dir), limit)
            met["in a save"] += _unfinished(run_dir)
            _strike(ranks, fault)
            ranks.wait(limit)
            assert ranks.left_behind() == [], fault
            _assert_resumed(ranks, whole)
        whole = int((run_dir / "latest").read_text().strip().removeprefix("step_"))
        if fault.kind in ("flip", "cut", "delete"):
            whole = _damage(run_dir, fault)
        met[fault.kind] += 1
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


def _last_step(run_dir: Path) -> int:
    steps = runs.steps_of(run_dir)
    return steps[-1]["step"] if steps else 0


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
