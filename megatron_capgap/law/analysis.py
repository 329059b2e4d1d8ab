"""Analysis of records: fits the model, gives the verdicts, and builds law.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_capgap.law import causes, cells, compare, paper_reading, verdict
from megatron_capgap.law.advice import Advice
from megatron_capgap.law.causes import Cause
from megatron_capgap.law.cells import Training
from megatron_capgap.law.compare import Score
from megatron_capgap.law.gaussian_process import Process
from megatron_capgap.law.next_runs import NextRunsPlan
from megatron_capgap.law.paper_reading import PaperFit
from megatron_capgap.law.records import Record, conditions
from megatron_capgap.law.verdict import Finding

DIGITS, DRAWN_DIGITS, CAUSE_DIGITS = 6, 3, 4
"""Significant digits in law.json; for posterior quantities about the precision of the draws."""
FEW_TEACHERS = 3
ODD = 4.0
"""Standard deviations beyond which a run is reported as an outlier."""


@dataclass(frozen=True)
class Analysis:
    """Result of the analysis of a set of records."""

    records: Sequence[Record]
    count: str
    trainings: Sequence[Training]
    process: Process
    findings: Sequence[Finding]
    """One per student, ascending."""
    reading: PaperFit
    """The paper's method on the same records, for comparison."""
    causes: Sequence[Cause]
    """Effects of initialisation and of teaching, where the same starts were also trained on labels alone."""
    remarks: Sequence[str]

    @property
    def law(self) -> bool:
        """Whether enough students have an interior optimum with sufficient probability."""
        return verdict.is_law(self.findings)


def analyse(
    records: Sequence[Record], count: str, everything: Sequence[Record] = (), places: Mapping[Record, str] | None = None
) -> Analysis:
    """Fits the model of all cells and gives the verdicts.

    Args:
        records: under one set of conditions, from `records.select`.
        count: how parameters are counted, one of `records.COUNTS`.
        everything: all records, including those on labels alone from the same starts.
        places: file and line of the records, to name outliers.

    Raises:
        LawError: records contradict each other.
    """
    trainings = cells.trainings(records, count)
    process = Process(cells.cells(records, count), np.random.default_rng(0))
    findings = verdict.findings(process)
    apart = causes.causes(records, everything, count)
    remarks = [*_odd(records, process, places or {}), *_remarks(records, trainings, process, apart)]
    alone = sum(not each.taught and each.init == records[0].init for each in everything)
    if records[0].taught and alone and not apart:
        remarks.append(
            f"{alone} runs on labels alone were found, but too few with the student, seed, teacher, teacher_seed, "
            "tokens and tokenizer of a taught run to tell its start from its teaching"
        )
    if not records[0].taught:
        remarks.append("these runs had no teacher: the curves are those of their starts alone")
    return Analysis(records, count, trainings, process, findings, paper_reading.read(records, count), apart, remarks)


def compared(study: Analysis) -> list[Score]:
    """How well the model of all cells and laws with few parameters predict unseen students."""
    own = [record.teacher_valid_loss for record in study.records]
    losses = np.array(own, dtype=np.float64) if None not in own else None
    return compare.scores(study.process.cells, losses)


def as_json(
    study: Analysis, advice: Advice | None = None, scores: Sequence[Score] = (), plan: NextRunsPlan | None = None
) -> str:
    """Contents of law.json; the same records give the same bytes."""
    content: dict[str, Any] = {
        "format": 2,
        "verdict": "law" if study.law else "no law",
        "count": study.count,
        "records": len(study.records),
        "conditions": conditions(study.records),
        "interval_level": verdict.LEVEL,
        "students": [_student(each) for each in study.findings],
        "scales": _rounded(study.process.scales(), DRAWN_DIGITS),
        "teacher_noise": _rounded(float(study.process.teachers().std()), DRAWN_DIGITS),
        "teachers": [asdict(training) for training in study.trainings],
        "advice": _advice(advice) if advice else None,
        "next": _plan(plan) if plan else None,
        "causes": [_cause(each) for each in study.causes],
        "models": [_rounded(asdict(score), DRAWN_DIGITS) for score in scores],
        "paper_reading": paper_reading.as_dict(study.reading),
        "remarks": list(study.remarks),
    }
    return json.dumps(_rounded(content, DIGITS), indent=1) + "\n"


def _student(found: Finding) -> dict[str, Any]:
    drawn = {
        "probability": found.probability,
        "probabilities": found.probabilities,
        "best_teacher": found.best,
        "best_teacher_interval": found.interval,
        "best_ratio": found.best / found.student,
    }
    looked_at = [found.grid[0], found.grid[-1]]
    return {
        "student_params": found.student,
        "verdict": found.verdict,
        **_rounded(drawn, DRAWN_DIGITS),
        "best_teacher_measured": found.measured,
        "teachers_looked_at": looked_at,
    }


def _cause(each: Cause) -> dict[str, Any]:
    drawn: dict[str, float | dict[str, Any] | None] = {
        "rise_of_start": each.rise_of_start,
        "loss_of_teaching": each.loss_of_teaching,
    }
    for name, quantiles in (("teaching", each.teaching), ("start", each.start)):
        ends = {} if quantiles is None else {"smallest": quantiles[:, 0].tolist(), "largest": quantiles[:, -1].tolist()}
        drawn[name] = ends or None
    looked_at = [each.grid[0], each.grid[-1]]
    return {
        "student_params": each.student,
        "pairs": each.pairs,
        "teachers_looked_at": looked_at,
        **_rounded(drawn, CAUSE_DIGITS),
    }


def _advice(advice: Advice) -> dict[str, Any]:
    content = asdict(advice)
    for name in ("best", "interval", "within"):
        content[name] = _rounded(content[name], DRAWN_DIGITS)
    drawn = ("regret", "interval", "probability", "against")
    content["candidates"] = [
        {name: _rounded(value, DRAWN_DIGITS) if name in drawn else value for name, value in each.items()}
        for each in content["candidates"]
    ]
    return content


def _plan(plan: NextRunsPlan) -> dict[str, Any]:
    steps = [
        {
            "flops": step.flops,
            "gain": _rounded(step.gain, DRAWN_DIGITS),
            "new_trainings": len(step.trained),
            "runs": [
                {
                    "student_params": run.student,
                    "teacher": run.teacher.name,
                    "teacher_params": run.teacher.size,
                    "teacher_seed": run.teacher_seed,
                    "new_training": run.training >= plan.known,
                    "seed": run.seed,
                }
                for run in step.runs
            ],
        }
        for step in plan.steps
    ]
    regrets = _rounded({"regret": plan.regret, "regret_then": plan.regret_after}, DRAWN_DIGITS)
    return {"budget": plan.budget, "flops": plan.flops, **regrets, "considered": plan.considered, "steps": steps}


def _remarks(
    records: Sequence[Record], trainings: Sequence[Training], process: Process, apart: Sequence[Cause]
) -> list[str]:
    """Remarks about the runs, for the report."""
    found = []
    once = [size for size, number in Counter(training.size for training in trainings).items() if number == 1]
    if once:
        found.append(
            f"{len(once)} of {len({training.size for training in trainings})} teacher sizes were trained once: how "
            "much trainings differ is inferred from the curves, not seen; train each size at least twice"
        )
    with_loss = [training for training in trainings if training.loss is not None]
    if len(with_loss) < len(trainings):
        found.append(
            f"{len(trainings) - len(with_loss)} of {len(trainings)} trainings of teachers come without "
            "teacher_valid_loss, so a poor training cannot be told from a large gap"
        )
    if records[0].init.startswith("pruned") and records[0].taught and not apart:
        found.append(
            "students were initialised by pruning their teacher, so these curves include both the cost of pruning and "
            "the effect of teaching; only the same starts trained without a teacher tell them apart"
        )
    if smaller := int((process.cells.teacher < process.cells.student).sum()):
        found.append(f"{smaller} runs have a teacher with fewer parameters than their student")
    for each in apart:
        if each.teaching[2].max() < verdict.MATTERS:
            found.append(
                f"student of {each.student:,.0f}: do not distil it; no teacher gives {verdict.MATTERS:g} nats more "
                "than labels alone, which cost fewer FLOPs"
            )
    for student in process.cells.students():
        mine = process.cells.student == student
        seeds = len(np.unique(process.cells.curve[mine]))
        teachers = np.unique(process.cells.teacher[mine])
        if len(teachers) < FEW_TEACHERS:
            found.append(
                f"student of {student:,.0f}: {len(teachers)} teacher(s), so its verdict rests on the other students"
            )
        if missing := seeds * len(np.unique(process.cells.training[mine])) - int(mine.sum()):
            found.append(f"student of {student:,.0f}: {missing} of its teacher and seed pairs were not run")
    if len(process.cells.students()) < verdict.STUDENTS:
        found.append(
            f"{len(process.cells.students())} student(s); the word law needs interior optima of {verdict.STUDENTS}"
        )
    return found


def _odd(records: Sequence[Record], process: Process, places: Mapping[Record, str]) -> list[str]:
    """Outliers: runs that are very unlikely given all others. An outlier increases the estimated noise it is compared
    with, so fewer than about 20 runs cannot reveal one."""
    found = []
    for record, miss, sd in zip(records, *process.left_out(), strict=True):
        if abs(miss) > ODD * sd and abs(miss) > verdict.MATTERS:
            line = places.get(record, "").rpartition("/")[2]
            named, side = f" ({line})" * bool(line), "above" if miss > 0 else "below"
            found.append(
                f"run of student {record.student_params:,} under teacher {record.teacher_params:,}, seed {record.seed}"
                f"{named}: its loss of {record.valid_loss:.4f} is {abs(miss):.4f} nats {side} what all other runs "
                f"expect, {abs(miss) / sd:.1f} standard deviations; check that run, or leave it out"
            )
    return found


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return value
