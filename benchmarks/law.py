"""Simulation study of the verdicts and recommendations of tools/fit_law.py on records with known truth.

    python benchmarks/law.py --out FILE.jsonl [--draws 100] [--jobs 2] [--truths exact,flat]

For each truth, standard deviation of the random effect of teachers' trainings, and design (students x teacher sizes x
seeds x trainings per size) it draws records, fits them, and requests a teacher for an unseen student. Finished draws
are stored in FILE.jsonl; a second call continues where the first one stopped. The table has one row per cell:

    holds     share of draws in which the 90% interval contains the best teacher (`-` if all teachers are equally good)
    end       share whose best teacher is at an end of the range, where an interval cannot miss on one side
    width     median of log(high / low) of that interval
    law       share of draws that say "law"
    wrong     share of students whose true curve contradicts the verdict
    said      median expected regret of the recommendation, nats per token; `seen` is the true regret, then its mean
    rule      mean regret of the teacher nearest to 2.5 times the student
    paper     the paper's method on the same draws: share with a law, share whose interval contains it, mean regret
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # one draw a core
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from megatron_capgap.law import paper_reading, verdict  # noqa: E402
from megatron_capgap.law.advice import advise  # noqa: E402
from megatron_capgap.law.cells import SAME_SIZE, cells  # noqa: E402
from megatron_capgap.law.gaussian_process import Process  # noqa: E402
from megatron_capgap.law.records import Record  # noqa: E402
from megatron_capgap.law.verdict import Finding  # noqa: E402
from tests.support import law as made  # noqa: E402

LUCK = (0.0, 0.004, 0.0137)
DESIGNS = ((4, 4, 2, 1), (4, 6, 2, 1), (4, 8, 2, 1), (3, 5, 1, 3))
"""Numbers of students, teacher sizes, seeds, and trainings per teacher size."""
SCATTER = 0.2
CANDIDATES = 24
FINE = 4001


@dataclass(frozen=True)
class Truth:
    """The true losses."""

    loss: Callable[[float, float], float]
    students: tuple[float, float]
    """Smallest and largest of four students; with fewer students, the first ones at the same spacing."""
    teachers: tuple[float, float]
    noise: float
    """Standard deviation of one run, nats per token."""
    scatter: float = 0.0
    """Standard deviation of log k between students."""
    best: bool = True
    """Whether some teacher is better than others."""


PLAIN = ((1e6, 8e6), (1.35e6, 9.6e7))
TRUTHS = {
    "exact": Truth(made.exact, *PLAIN, 0.002),
    "scattered": Truth(made.exact, *PLAIN, 0.002, scatter=SCATTER),
    "asymmetric": Truth(made.asymmetric, *PLAIN, 0.002),
    "apple": Truth(made.apple, (8e7, 6.4e8), (1.08e8, 7.7e9), 0.001),
    "flat": Truth(made.flat, *PLAIN, 0.002, best=False),
    "monotone": Truth(made.no_optimum, *PLAIN, 0.002),
    "pilot": Truth(made.pilot, (1.11e5, 7.8e5), (2e5, 9.67e6), 0.002),
}


@dataclass(frozen=True)
class Cell:
    truth: str
    luck: float
    design: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.truth} {self.luck:g} {'x'.join(map(str, self.design))}"


def draw(cell: Cell, number: int) -> tuple[list[Record], float, Callable[[float], float]]:
    """Records, the size of a student that is not among them, and its true loss by teacher."""
    random = np.random.default_rng([number, 7])
    truth, (students, sizes, seeds, trainings) = TRUTHS[cell.truth], cell.design
    every = np.geomspace(*truth.students, 4)[:students]
    teachers = np.geomspace(truth.teachers[0], truth.teachers[1] * every[-1] / truth.students[1], sizes)
    k = 2.5 * np.exp(truth.scatter * random.standard_normal(students + 1))
    luck = cell.luck * random.standard_normal((sizes, trainings))
    new = float(every[0] * (every[-1] / every[0]) ** random.uniform())
    losses = [(lambda s, t, k=each: truth.loss(s, t, k)) if truth.scatter else truth.loss for each in k]
    found = []
    for index, student in enumerate(every):
        shifts = 0.02 * random.standard_normal(seeds * trainings)
        for place, teacher in enumerate(teachers):
            for training in range(trainings if teacher > 1.02 * student else 0):
                for seed in range(seeds):
                    value = losses[index](student, teacher) + luck[place, training] + shifts[seed]
                    sizes_ = {"student_params": int(student), "teacher_params": int(teacher)}
                    totals = {f"{name}_total": int(1.3 * size) for name, size in sizes_.items()}
                    one = made.record(**sizes_, **totals, seed=seed + 1, teacher_seed=training + 1)
                    found.append(replace(one, valid_loss=float(value + truth.noise * random.standard_normal())))
    # The model identifies a student this close to one of the data with it, including its scatter.
    twin = next((index for index, each in enumerate(every) if abs(np.log(new / each)) < SAME_SIZE), -1)
    return found, new, lambda teacher: float(losses[twin](new, teacher))


def once(job: tuple[Cell, int]) -> dict[str, Any]:
    """Fits one draw and compares the result with the truth."""
    cell, number = job
    records, student, loss = draw(cell, number)
    process = Process(cells(records, "non-embedding"), np.random.default_rng(number))
    ratios = verdict.span(process, student)
    assert ratios is not None
    inner = student * np.exp(ratios[[0, -1]]) * [1 + 1e-9, 1 - 1e-9]
    catalogue = {f"{size:.0f}": float(size) for size in np.geomspace(*inner, CANDIDATES)}
    fine = np.geomspace(*inner, FINE)
    curve = np.array([loss(size) for size in fine])
    best, lowest = float(fine[curve.argmin()]), float(curve.min())
    advice, findings = advise(process, student, catalogue), verdict.findings(process)
    assert advice.interval is not None
    losses = {name: loss(size) for name, size in catalogue.items()}
    rule = min(catalogue, key=lambda name: abs(np.log(catalogue[name] / (2.5 * student))))
    low, high = advice.interval
    return {
        "cell": cell.name,
        "draw": number,
        "holds": bool(low * (1 - 1e-6) <= best <= high * (1 + 1e-6)),
        "end": best in (fine[0], fine[-1]),
        "width": float(np.log(high / low)),
        "law": verdict.is_law(findings),
        "said": advice.candidates[0].regret,
        "seen": losses[advice.candidates[0].name] - lowest,
        "rule": losses[rule] - lowest,
        "wrong": float(np.mean([_wrong(cell, each) for each in findings])) if cell.truth != "scattered" else None,
        **_paper(records, student, best, losses, lowest, catalogue),
    }


def _wrong(cell: Cell, found: Finding) -> bool:
    """Whether the verdict on a student contradicts its true curve."""
    curve = np.array([TRUTHS[cell.truth].loss(found.student, size) for size in found.grid])
    falls, rises = curve[0] - curve.min() > verdict.MATTERS, curve[-1] - curve.min() > verdict.MATTERS
    true = {(True, True): verdict.INTERIOR, (False, True): verdict.SMALLEST, (True, False): verdict.SATURATING}
    return found.verdict not in (verdict.NOT_DETECTED, true.get((bool(falls), bool(rises))))


def _paper(
    records: Sequence[Record],
    student: float,
    best: float,
    losses: dict[str, float],
    lowest: float,
    catalogue: dict[str, float],
) -> dict[str, Any]:
    """The paper's method on the same draw; it gets one training per size, because it does not support several."""
    first = [record for record in records if record.teacher_seed == 1]
    chosen = paper_reading.read(first, "non-embedding").chosen
    if chosen is None:
        return {"paper_law": False, "paper_holds": None, "paper_seen": None}
    teacher = float(chosen.teacher(np.array([student]))[0])
    nearest = min(catalogue, key=lambda name: abs(np.log(catalogue[name] / teacher)))
    draws = chosen.teacher_draws(student, np.random.default_rng(1))
    holds = None
    if draws is not None:
        low, high = np.quantile(draws, [0.05, 0.95])
        holds = bool(low <= best <= high)
    return {"paper_law": True, "paper_holds": holds, "paper_seen": losses[nearest] - lowest}


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The table's lines, one per cell."""
    names = "draws holds  end width   law wrong    said    seen    mean    rule | paper: law holds mean"
    lines = [f"{'truth luck design':28s} {names}"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        rows.setdefault(each["cell"], []).append(each)
    for name, row in rows.items():

        def mean(key: str, row: list[dict[str, Any]] = row) -> float:
            values = [each[key] for each in row if each[key] is not None]
            return float(np.mean(values)) if values else float("nan")

        def median(key: str, row: list[dict[str, Any]] = row) -> float:
            return float(np.median([each[key] for each in row]))

        holds = f"{mean('holds'):5.2f}" if TRUTHS[name.split()[0]].best else "    -"
        lines.append(
            f"{name:28s} {len(row):5d} {holds} {mean('end'):4.2f} {median('width'):5.2f} {mean('law'):5.2f} "
            f"{mean('wrong'):5.2f} {median('said'):.5f} {median('seen'):.5f} {mean('seen'):.5f} {mean('rule'):.5f} |"
            f"        {mean('paper_law'):.2f}  {mean('paper_holds'):.2f} {mean('paper_seen'):.5f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--truths", default=",".join(TRUTHS))
    args = parser.parse_args()
    wanted = [
        (Cell(truth, luck, design), number)
        for truth in args.truths.split(",")
        for luck in LUCK
        for design in DESIGNS
        for number in range(args.draws)
    ]
    known = {}
    if args.out.exists():
        for line in args.out.read_text().splitlines():
            each = json.loads(line)
            known[each["cell"], each["draw"]] = each
    missing = [(cell, number) for cell, number in wanted if (cell.name, number) not in known]
    with ProcessPoolExecutor(args.jobs) as pool, args.out.open("a") as out:
        for each in pool.map(once, missing, chunksize=8):
            known[each["cell"], each["draw"]] = each
            out.write(json.dumps(each) + "\n")
            out.flush()
    print("\n".join(table([known[cell.name, number] for cell, number in wanted])))


if __name__ == "__main__":
    main()
