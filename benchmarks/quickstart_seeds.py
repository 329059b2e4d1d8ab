"""The quickstart's pruned student over several seeds: with the teacher, with half a teacher, and without.

    bash examples/quickstart/run.sh
    python benchmarks/quickstart_seeds.py --seeds 1 2 3 --out docs/quickstart_seeds.json

A seed decides the order of the data. All students of a seed start from the same weights and read the same tokens in the
same order, on one rank; the loss is that of the whole held-out set after the last step. Teacher and pruned student are
the quickstart's. Runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "examples/quickstart/work"
PRUNED = ["--student.model=null", "--student.checkpoint=runs/pruned"]
ARMS: dict[str, tuple[str, list[str]]] = {
    "pruned, distilled": ("distill", ["--config", "../student.yaml"]),
    "pruned, distilled, half of the loss": (
        "distill",
        ["--config", "../student.yaml", "--objective.divergence_weight=0.5", "--objective.cross_entropy_weight=0.5"],
    ),
    "pruned, no teacher": ("adapt", ["--config", "../alone.yaml", *PRUNED]),
}


def held_out_loss(arm: str, seed: int) -> float:
    """Trains a student, unless it is there; returns its held-out loss."""
    stage, words = ARMS[arm]
    name = f"runs/seeds/{arm.replace(', ', '_').replace(' ', '_')}_{seed}"
    settings = [f"--run_dir={name}", f"--seed={seed}", "--student.layout={}", "--train.micro_batch=32"]
    settings += ["--train.eval_every=0", "--train.eval_batches=null", "--checkpoint.every=0"]
    command = [sys.executable, "-m", "megatron_capgap", stage, *words, *settings]
    subprocess.run(command, cwd=WORK, check=True, stdout=subprocess.DEVNULL)
    lines = (WORK / name / "metrics.jsonl").read_text().splitlines()
    return [entry["valid_loss"] for entry in map(json.loads, lines) if "valid_loss" in entry][-1]


def main() -> int:
    """Runs all arms and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="file for the losses, JSON")
    options = parser.parse_args()
    if not (WORK / "runs/pruned").is_dir():
        parser.error(f"{WORK}/runs/pruned is not there: run examples/quickstart/run.sh first")
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            losses[arm].append(held_out_loss(arm, seed))
            print(f"seed {seed}  {arm:<38}{losses[arm][-1]:.4f}", flush=True)
    teacher = json.loads((WORK / "runs/evaluate_teacher/evaluation.json").read_text())["valid_loss"]
    report(losses, options.seeds, teacher)
    if options.out:
        found = {"seeds": options.seeds, "teacher": teacher, "students": losses}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def report(losses: dict[str, list[float]], seeds: list[int], teacher: float) -> None:
    """Prints each arm's loss by seed, and its difference from the arm without a teacher, seed by seed."""
    print(f"\nteacher: {teacher:.4f}\n")
    columns = "".join(f"{f'seed {seed}':>10}" for seed in seeds)
    print(f"{'student':<38}{columns}{'mean':>10}{'difference':>12}{'spread':>9}")
    alone = losses["pruned, no teacher"]
    for arm, found in losses.items():
        differences = [mine - theirs for mine, theirs in zip(found, alone, strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        cells = "".join(f"{loss:>10.4f}" for loss in [*found, statistics.mean(found)])
        print(f"{arm:<38}{cells}{statistics.mean(differences):>+12.4f}{spread:>9.4f}")


if __name__ == "__main__":
    sys.exit(main())
