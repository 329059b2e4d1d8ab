"""Builds the grid of the runs that a plan proposes, for tools/make_sweep.py. It uses the teachers and starts of the
sweep that the records come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_capgap.law.cells import SAME_SIZE
from megatron_capgap.law.files import LawError
from megatron_capgap.law.formatting import short
from megatron_capgap.law.next_runs import CandidateRun, NextRunsPlan
from megatron_capgap.law.sweep import STARTS, run_dir, trained_apart

KEPT = ("common", "teach", "start", "prune", "distill", "ranks", "slurm")


def next_grid(
    plan: NextRunsPlan, grid: Mapping[str, Any], init: str, sizes: Callable[[Any], float], further: Mapping[str, Any]
) -> dict[str, Any]:
    """A grid of only the proposed runs.

    Args:
        plan: with at least one step.
        grid: grid of the sweep that the records come from, valid for `sweep.expand`.
        init: initialisation of the records' students.
        sizes: returns a model section's parameters, counted as in the plan.
        further: model sections of teachers that may be missing in the grid, by name.

    Raises:
        LawError: a student, or a training of a teacher, is not in the grid.
    """
    if init not in STARTS or init == "pruned_other":
        raise LawError(f"--grid: init {init!r} is not supported in a grid of new runs; take the cells from the table")
    apart, _ = trained_apart(dict(grid))
    taken = _Names(plan, apart, sizes, further)
    rows: list[dict[str, Any]] = []
    for run in (run for step in plan.steps for run in step.runs):
        student, teacher = taken.student(run, init), taken.teacher(run)
        row = {"init": init, "students": [student], "teachers": [teacher], "seeds": [run.seed], "labels": False}
        same = [each for each in rows if each["students"] == [student] and each["teachers"] == [teacher]]
        if same:
            same[0]["seeds"].append(run.seed)
        else:
            rows.append(row)
    return {
        "out": _beside(grid["out"]),
        **{name: grid[name] for name in KEPT if name in grid},
        "teachers": taken.teachers,
        "students": taken.students,
        "rows": rows,
    }


class _Names:
    """Names of students and teachers in the grid, and the entries that the new grid needs."""

    def __init__(
        self, plan: NextRunsPlan, grid: Mapping[str, Any], sizes: Callable[[Any], float], further: Mapping[str, Any]
    ) -> None:
        self._plan, self._grid, self._sizes, self._further = plan, grid, sizes, further
        self._new: dict[int, str] = {}
        # All existing teachers are kept, so that the next plan can be made from this grid.
        self.teachers = {name: self._kept_teacher(name) for name in grid["teachers"]}
        self.students: dict[str, Any] = {}

    def student(self, run: CandidateRun, init: str) -> str:
        """The name of a run's student; keeps its entry in the new grid."""
        name = self._close(self._grid["students"], run.student)
        if name is None:
            raise LawError(f"--grid: no student of {short(run.student)} is in it; give the grid of these records")
        entry = self._grid["students"][name]
        if init == "fixed" and entry.get("checkpoint") is None:
            entry = {**entry, "checkpoint": run_dir(self._grid["out"], f"start-{name}")}
        self.students[name] = entry
        return name

    def teacher(self, run: CandidateRun) -> str:
        """The name of a run's teacher; adds an entry for a new training."""
        if run.training >= self._plan.known:
            if run.training not in self._new:
                self._new[run.training] = self._add(run)
            return self._new[run.training]
        size, seed = run.teacher.size, run.teacher_seed
        for name, entry in self._grid["teachers"].items():
            if self._is(entry, size) and (seed is None or self._seed(entry) in (None, seed)):
                return name
        trained_with = "" if seed is None else f" trained with seed {seed}"
        raise LawError(f"--grid: no teacher of {short(size)}{trained_with} is in it; give the grid of these records")

    def _add(self, run: CandidateRun) -> str:
        """Adds a new training: of a teacher of the grid with an unused seed, or of a teacher from `further`."""
        size = run.teacher.size
        same = {name: entry for name, entry in self.teachers.items() if self._is(entry, size)}
        if not same:
            if run.teacher.name not in self._further:
                raise LawError(f"--grid: no teacher of {short(size)} is in it; give the grid of these records")
            name, entry, seed = re.sub(r"[^\w.]+", "-", run.teacher.name), {"model": self._further[run.teacher.name]}, 0
        else:
            name, entry = next(iter(same.items()))
            name = re.sub(r"-(training|again)\d+$", "", name)
            seed = max([self._seed(each) or 0 for each in same.values()])
        rest = {key: value for key, value in entry.items() if key not in ("checkpoint", "seed")}
        self.teachers[f"{name}-again{seed + 1}"] = {**rest, "seed": seed + 1}
        return f"{name}-again{seed + 1}"

    def _kept_teacher(self, name: str) -> dict[str, Any]:
        entry = dict(self._grid["teachers"][name])
        if (seed := self._seed(entry)) is not None:
            entry["seed"] = seed
        return {"checkpoint": run_dir(self._grid["out"], f"teacher-{name}"), **entry}

    def _seed(self, entry: Mapping[str, Any]) -> int | None:
        keys = (entry, *(self._grid.get(kind, {}) for kind in ("teach", "common")))
        return next((each["seed"] for each in keys if "seed" in each), None)

    def _is(self, entry: Mapping[str, Any], size: float) -> bool:
        return entry.get("model") is not None and abs(np.log(self._sizes(entry["model"]) / size)) < SAME_SIZE

    def _close(self, entries: Mapping[str, Any], size: float) -> str | None:
        return next((name for name, entry in entries.items() if self._is(entry, size)), None)


def _beside(out: str) -> str:
    """Folder of the new runs: OUT-next, then OUT-next2."""
    match = re.fullmatch(r"(.*-next)(\d*)", out.rstrip("/"))
    return f"{match[1]}{int(match[2] or 1) + 1}" if match else f"{out.rstrip('/')}-next"
