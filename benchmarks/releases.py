"""Compatibility of checkpoints between releases of Megatron-Core: each release loads the checkpoints of all others.

    python benchmarks/releases.py --work DIR [--releases 0.16.1,0.17.1,0.18.2,0.19.2] [--fp8 delayed]

Requires Python 3.12 or 3.13, which all releases support. pip installs each release in its own folder below DIR, which
precedes this Python's packages on the path; a DIR works with one Python only, because it contains compiled helpers.
Under each release a tiny model trains on 4 ranks (tensor 2 x pipeline 2) and saves after steps 2 and 4. Every release
then evaluates every checkpoint of step 4 on one rank, without FP8, and resumes from every one of step 2 on 4 ranks. A
cell contains the largest relative difference of the evaluation, and of the resumed steps' losses and gradient norms,
from those of the release that wrote the checkpoint; `=` means that all digits are equal. The exit code is 1 if a cell
is not `=`.

    python benchmarks/releases.py --compare RUNS RUNS

reads the metrics.jsonl of runs that are in both folders, of one example under two releases, and prints the largest
difference of all steps and evaluations of each. The exit code is 1 if one exceeds 1e-5.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from megatron_capgap.runtime import third_party
from tests.support import runs
from tests.support.processes import ROOT

LAYOUT = {"tensor": 2, "pipeline": 2, "sequence": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--work", type=Path, metavar="DIR")
    what.add_argument("--compare", type=Path, nargs=2, metavar="RUNS")
    parser.add_argument("--releases", default="0.16.1,0.17.1,0.18.2,0.19.2")
    parser.add_argument("--fp8", metavar="RECIPE", help="train in FP8, in Transformer Engine's layers")
    args = parser.parse_args()
    if args.compare:
        return 0 if compare_runs(*args.compare) else 1
    third_party.prepare()
    releases = args.releases.split(",")
    args.work.mkdir(parents=True, exist_ok=True)
    for release in releases:
        fetch(release, args.work)
    precision = {"compute": "bf16", "fp8": {"recipe": args.fp8}} if args.fp8 else {"compute": "fp32"}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        return 0 if compare(releases, precision, args.work, Path(folder)) else 1


def compare(releases: list[str], precision: dict[str, Any], work: Path, folder: Path) -> bool:
    """Prints the table; returns whether all cells are equal."""
    fixtures = runs.make_material(folder)
    for release in releases:
        stage("adapt", config_of(fixtures, folder / f"trained_{release}", precision), release, work, ranks=4)
    print("| written under | " + " | ".join(f"read under {release}" for release in releases) + " |")
    print("|---" * (len(releases) + 1) + "|", flush=True)
    equal = True
    for writer in releases:
        expected, cells = read(fixtures, writer, writer, precision, work), []
        unbroken = steps_after_the_second(folder / f"trained_{writer}")
        for reader in releases:
            found = expected if reader == writer else read(fixtures, writer, reader, precision, work)
            apart = max(difference(found[0], expected[0]), difference(found[1], unbroken))
            cells.append("=" if apart == 0 else f"{apart:.1e}")
        equal &= set(cells) == {"="}
        print(f"| {writer} | " + " | ".join(cells) + " |", flush=True)
    return equal


def compare_runs(one: Path, other: Path) -> bool:
    """Prints the differences of the runs below two folders; returns whether all are below 1e-5."""
    names = sorted(file.parent.name for file in one.glob("*/metrics.jsonl") if (other / file.parent.name).is_dir())
    worst = 0.0 if names else float("inf")
    for name in names:
        found, expected = (runs.metrics(folder / name) for folder in (one, other))
        apart = difference(numbers(found), numbers(expected))
        print(f"{name}: {len(expected)} lines, largest relative difference {apart:.1e}")
        worst = max(worst, apart)
    return worst <= 1e-5


def fetch(release: str, work: Path) -> None:
    """Installs a release of Megatron-Core in its own folder, once; the folder gets its name when it is complete."""
    folder = work / f"megatron_core_{release}"
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=work) as place:
        part = Path(place) / folder.name
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part)]
        subprocess.run([*words, f"megatron-core=={release}"], check=True)
        part.rename(folder)


def config_of(fixtures: runs.Fixtures, run_dir: Path, precision: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Configuration of four steps of next-token training. FP8 needs multiples of 16 in each rank's weight shard."""
    changes = {
        "student__layout": LAYOUT,
        "student__model__ffn": 64,
        "precision": precision,
        "checkpoint__every": 2,
        "data__valid": None,
        **changes,
    }
    return runs.adapt_config(fixtures, run_dir, **changes)


def read(
    fixtures: runs.Fixtures, writer: str, reader: str, precision: dict[str, Any], work: Path
) -> tuple[list[float], list[float]]:
    """One release's results from another one's checkpoints: the evaluation, and the steps after the second."""
    folder = fixtures.folder
    trained, copy = folder / f"trained_{writer}", folder / f"{writer}_resumed_under_{reader}"
    runs.rewind(trained, copy, 2)
    stage("adapt", config_of(fixtures, copy, precision), reader, work, ranks=4)
    evaluated = folder / f"{writer}_evaluated_under_{reader}"
    changes = {"student__model": None, "student__checkpoint": str(trained), "student__layout": {}}
    plain = {"compute": precision["compute"]}  # delayed scaling has no scales for a model that only runs forward
    config = runs.changed(config_of(fixtures, evaluated, plain, **changes), data__valid=fixtures.data["valid"])
    stage("evaluate", config, reader, work, ranks=1)
    evaluation = json.loads((evaluated / "evaluation.json").read_text())
    return numbers([evaluation]), steps_after_the_second(copy)


def steps_after_the_second(run_dir: Path) -> list[float]:
    """The metrics of a run's steps 3 and 4."""
    return numbers([step for step in runs.steps_of(run_dir) if step["step"] > 2])


def stage(name: str, config: dict[str, Any], release: str, work: Path, ranks: int) -> None:
    """Runs a stage under a release of Megatron-Core; exits this program if it fails."""
    path = os.pathsep.join([str(work / f"megatron_core_{release}"), str(ROOT)])
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "megatron_capgap"]
    done = subprocess.run(
        [*words, name, "--config", runs.write_config(config)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name} under {release} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def numbers(entries: list[dict[str, Any]]) -> list[float]:
    """The losses and norms of evaluations or steps, as one list."""

    def flat(value: Any) -> Iterator[float]:
        if isinstance(value, dict):
            for key in sorted(value):
                yield from flat(value[key]) if "second" not in key else ()
        elif isinstance(value, float):
            yield value

    return [number for entry in entries for number in flat(entry)]


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference; infinite if the lengths differ."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(one - other) / max(abs(other), 1e-30) for one, other in zip(found, expected, strict=True))


if __name__ == "__main__":
    sys.exit(main())
