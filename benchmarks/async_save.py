"""Measures how much longer a step takes during a checkpoint save, with and without checkpoint.async_save.

    python benchmarks/async_save.py [--world 1] [--saves 6]

A step is timed from one line of metrics to the next, so a step with a save includes all time that training spends on
the save: the copy of the state, and the writing as far as training waits for it. Each rank uses one thread, so that one
rank on two cores leaves a core to the writer, like the host of a GPU.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
os.environ["OMP_NUM_THREADS"] = "1"

from megatron_capgap.cli import main as capgap
from tests.support import runs
from tests.support.pool import WorkerPool

EVERY = 4
MODEL = {"layers": 6, "hidden": 384, "heads": 6, "ffn": 1024, "vocab": runs.VOCAB}


def times_of(words: list[str]) -> list[float]:
    """Runs a command on one rank; returns the time at which each step was reported."""
    from megatron_capgap.training import loop

    report, times = loop._log_step, []

    def report_and_look(*arguments: Any) -> None:
        times.append(time.perf_counter())
        report(*arguments)

    loop._log_step = report_and_look
    try:
        assert capgap(words) == 0
        return times
    finally:
        loop._log_step = report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=1, help="ranks, data-parallel")
    parser.add_argument("--saves", type=int, default=6)
    args = parser.parse_args()
    pool = WorkerPool()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fixtures = runs.make_material(folder)
        print("| | median step, s | with a save, s | of the median | the worst | bytes |\n|---|---|---|---|---|---|")
        for words, beside in (("while training waits", False), ("async_save", True)):
            run_dir = folder / words.replace(" ", "_")
            changes = {"student__model": MODEL, "train__steps": EVERY * args.saves + EVERY - 1, "data__valid": None}
            changes |= {"data__sequence_length": 128, "train__global_batch": 16, "train__micro_batch": 8}
            changes |= {"checkpoint__every": EVERY, "checkpoint__async_save": beside, "checkpoint__keep": 1}
            config = runs.adapt_config(fixtures, run_dir, **changes)
            work = partial(times_of, ["adapt", "--config", runs.write_config(config)])
            times = pool.run(work, world=args.world, initialise=False, capture=True)[0].value
            steps = {step: times[step] - times[step - 1] for step in range(2, len(times))}  # from step to step + 1
            saving = [seconds for step, seconds in steps.items() if step % EVERY == 0]
            plain = statistics.median(seconds for step, seconds in steps.items() if step % EVERY)
            size = sum(file.stat().st_size for file in (run_dir / "checkpoints").rglob("*") if file.is_file())
            with_save, worst = statistics.median(saving), max(saving)
            print(
                f"| {words} | {plain:.3f} | {with_save:.3f} | {with_save / plain:.2f} | {worst / plain:.2f} | "
                f"{size / 1e6:.0f} MB |",
                flush=True,
            )
    pool.close()


if __name__ == "__main__":
    main()
