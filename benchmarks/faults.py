"""Fault injection: 50 random kills, signals and damaged files during one small run, compared with an undisturbed run.

    python benchmarks/faults.py [--count 50] [--seed 1] [--async] [--distill]

Two data-parallel ranks train on text; with --distill two pipeline stages are distilled from a teacher. With --async
checkpoints are written during training. Prints the schedule, which depends on the seed, and the counts; the exit code
is 1 if the result differs from that of the undisturbed run.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from tests.support import faults, runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--async", action="store_true", dest="beside", help="checkpoint.async_save")
    parser.add_argument("--distill", action="store_true", help="with a teacher")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        fixtures = runs.make_material(folder)
        wanted = faults.schedule(args.seed, args.count)
        for number, fault in enumerate(wanted):
            print(number, fault)
        teacher = train_teacher(fixtures) if args.distill else None
        broken, unbroken = (
            faults.config(fixtures, folder / name, args.count, teacher, beside=args.beside)
            for name in ("broken", "unbroken")
        )
        met = faults.endure(broken, wanted, folder / "output", limit=600.0)
        print(f"{args.count} of {args.count} resumed: {dict(met)}; {time.monotonic() - began:.0f} s", flush=True)
        runs.train_apart(faults.stage_of(unbroken), unbroken, faults.WORLD, 3600)
        same = runs.metrics(folder / "broken") == runs.metrics(folder / "unbroken")
        print(f"the same losses as undisturbed, to the last digit: {'yes' if same else 'NO'}")
    return 0 if same else 1


def train_teacher(fixtures: runs.Fixtures) -> Path:
    """Trains a larger model for a few steps; returns its run directory."""
    config = runs.adapt_config(fixtures, fixtures.folder / "teacher", student__model=runs.TEACHER, data__valid=None)
    runs.train_apart("adapt", config)
    return Path(config["run_dir"])


if __name__ == "__main__":
    sys.exit(main())
