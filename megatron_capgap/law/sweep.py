"""A grid of students, teachers and seeds as runs: which stage, which configuration, after which other runs.

    out: work/sweep                                   # folder of the sweep
    common: {device: cpu, data: {...}, ...}           # keys of every run
    teach: {train: {steps: 400}, ...}                 # keys of the teachers' runs (adapt)
    start: {train: {steps: 100}, ...}                 # keys of the runs that make fixed starts (adapt)
    prune: {prune: {batches: 8}, ...}                 # keys of the runs that cut students out of teachers (prune)
    distill: {train: {steps: 200}, ...}               # keys of the students' runs
    teachers: {t1: {model: {...}}, t2: {checkpoint: RUN}}
    students: {s1: {model: {...}}}                    # with init fixed also {checkpoint: RUN}
    rows:                                             # each: students x teachers x seeds
      - {init: random, seeds: [1, 2]}
      - {init: fixed, students: [s1], seeds: [1, 2]}
      - {init: pruned, seeds: [1, 2]}                 # out of each teacher, to the shape of the student's model
    ranks: 1                                          # processes of one run on this machine; 1 where not given
    slurm: ["--time=02:00:00", "--gres=gpu:1"]        # options for sbatch

out, common, distill, teachers, students and rows are needed. A row without students or teachers takes all of them.
Paths begin in the folder that make_sweep is called in, as those of every configuration do.

A teacher or student may bring sections of its own (`train: {...}`), which win over those of its kind of run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_capgap.law.records import LawError

SECTIONS = {
    "out": str,
    "common": dict,
    "teach": dict,
    "start": dict,
    "prune": dict,
    "distill": dict,
    "teachers": dict,
    "students": dict,
    "rows": list,
    "ranks": int,
    "slurm": list,
}
"""The keys of a grid and their kinds; what they mean stands above, where tools/make_sweep.py --help takes it from."""
_NEEDED = ("out", "common", "distill", "teachers", "students", "rows")
_ROW = {"init", "students", "teachers", "seeds"}


@dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    name: str
    stage: str
    config: dict[str, Any]
    after: tuple[str, ...] = ()
    """Names of the runs whose checkpoints it reads."""


@dataclass(frozen=True)
class Sweep:
    """All runs, each behind those that it needs."""

    out: str
    cells: tuple[Cell, ...]
    ranks: int
    """Processes of one run on this machine."""
    slurm: tuple[str, ...]
    """Options for sbatch."""

    def phases(self) -> list[list[Cell]]:
        """The runs that need none, those that need only these, and so on."""
        depth: dict[str, int] = {}
        for cell in self.cells:
            depth[cell.name] = 1 + max((depth[name] for name in cell.after), default=-1)
        return [[c for c in self.cells if depth[c.name] == level] for level in range(max(depth.values()) + 1)]


def expand(grid: Any) -> Sweep:
    """Checks a grid and spells out its runs.

    Args:
        grid: what the YAML file holds; see the module.

    Raises:
        LawError: a key that is missing, unknown or of the wrong kind, a name that the grid does not have.
    """
    _check(grid)
    cells: dict[str, Cell] = {}
    for name, teacher in grid["teachers"].items():
        if teacher.get("checkpoint") is None:
            made = _cell(grid, f"teacher-{name}", "adapt", "teach", teacher, student={"model": teacher["model"]})
            cells[made.name] = made
    for number, row in enumerate(grid["rows"]):
        start = STARTS.get(row.get("init"))
        if start is None:
            raise LawError(f"rows[{number}].init: {row.get('init')!r} given; {' or '.join(STARTS)} would do")
        for student in _names(grid, number, row, "students"):
            for teacher in _names(grid, number, row, "teachers"):
                for made in start(grid, student, teacher, _seeds(number, row)):
                    if made.stage == "distill" and made.name in cells:
                        raise LawError(
                            f"rows[{number}]: {made.name} is in an earlier row already; keep it in one of them"
                        )
                    cells[made.name] = made
    return Sweep(grid["out"], tuple(cells.values()), grid.get("ranks", 1), tuple(grid.get("slurm", ())))


def run_dir(out: str, name: str) -> str:
    """Where a run of the sweep lies."""
    return f"{out}/runs/{name}"


def _random(grid: Mapping[str, Any], student: str, teacher: str, seeds: list[int]) -> list[Cell]:
    """Random weights, by the seed alone: the same under every teacher."""
    section = {"model": grid["students"][student]["model"]}
    return [_student(grid, "random", student, teacher, seed, section) for seed in seeds]


def _fixed(grid: Mapping[str, Any], student: str, teacher: str, seeds: list[int]) -> list[Cell]:
    """One checkpoint for all teachers: the student's own, or a short training without a teacher."""
    entry = grid["students"][student]
    if entry.get("checkpoint") is not None:
        section = {"checkpoint": entry["checkpoint"]}
        return [_student(grid, "fixed", student, teacher, seed, section) for seed in seeds]
    start = _cell(grid, f"start-{student}", "adapt", "start", entry, student={"model": entry["model"]})
    section = {"checkpoint": start.config["run_dir"]}
    return [start, *(_student(grid, "fixed", student, teacher, seed, section, (start.name,)) for seed in seeds)]


def _pruned(grid: Mapping[str, Any], student: str, teacher: str, seeds: list[int]) -> list[Cell]:
    """Cut out of each teacher anew, as in the paper."""
    shape = grid["students"][student]["model"]
    target = {name: shape[name] for name in ("layers", "hidden", "heads", "kv_heads", "ffn") if name in shape}
    checkpoint, after = _teacher(grid, teacher)
    own = {"teacher": {"checkpoint": checkpoint}, "prune": target}
    cut = _cell(grid, f"prune-{student}-{teacher}", "prune", "prune", {}, after=after, **own)
    section = {"checkpoint": cut.config["run_dir"]}
    return [cut, *(_student(grid, "pruned", student, teacher, seed, section, (cut.name,)) for seed in seeds)]


STARTS: dict[str, Callable[[Mapping[str, Any], str, str, list[int]], list[Cell]]] = {
    "random": _random,
    "fixed": _fixed,
    "pruned": _pruned,
}
"""By `init`: from student, teacher and seeds to the runs, with those that make the student's start in front."""


def _student(
    grid: Mapping[str, Any],
    init: str,
    student: str,
    teacher: str,
    seed: int,
    section: dict[str, Any],
    after: tuple[str, ...] = (),
) -> Cell:
    """The distillation of one student by one teacher."""
    checkpoint, trained = _teacher(grid, teacher)
    after = (*trained, *after)
    name, taught = f"{init}-{student}-{teacher}-seed{seed}", {"teacher": {"checkpoint": checkpoint}, "seed": seed}
    return _cell(grid, name, "distill", "distill", grid["students"][student], student=section, after=after, **taught)


def _teacher(grid: Mapping[str, Any], teacher: str) -> tuple[str, tuple[str, ...]]:
    """A teacher's checkpoint, and the run that makes it where the grid does."""
    checkpoint = grid["teachers"][teacher].get("checkpoint")
    if checkpoint is None:
        return run_dir(grid["out"], f"teacher-{teacher}"), (f"teacher-{teacher}",)
    return checkpoint, ()


def _cell(
    grid: Mapping[str, Any],
    name: str,
    stage: str,
    kind: str,
    entry: Mapping[str, Any],
    after: tuple[str, ...] = (),
    **own: Any,
) -> Cell:
    """A run from the common keys, those of its kind, those that its model brings, and its own; the later ones win."""
    config: dict[str, Any] = {"run_dir": run_dir(grid["out"], name)}
    brought = {key: value for key, value in entry.items() if key not in ("model", "checkpoint")}
    for keys in (grid["common"], grid.get(kind, {}), brought, own):
        config = _merged(config, keys)
    return Cell(name, stage, config, after)


def _merged(first: dict[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _check(grid: Any) -> None:
    if not isinstance(grid, dict):
        raise LawError(f"a grid has {', '.join(_NEEDED)}; {str(grid)[:40]!r} has none of them")
    for key, value in grid.items():
        if key not in SECTIONS:
            raise LawError(f"{key}: unknown key of a grid; it has {', '.join(SECTIONS)}")
        if not isinstance(value, SECTIONS[key]) or isinstance(value, bool):
            raise LawError(f"{key}: {str(value)[:40]!r} given; {SECTIONS[key].__name__} would do")
    for key in _NEEDED:
        if not grid.get(key):
            raise LawError(f"{key}: missing or empty; a grid has {', '.join(_NEEDED)}")
    for kind in ("teachers", "students"):
        for name, entry in grid[kind].items():
            given = isinstance(entry, dict) and {"model", "checkpoint"} & entry.keys()
            if not given or (kind == "students" and "model" not in entry):
                needs = "a model or a checkpoint" if kind == "teachers" else "a model"
                raise LawError(
                    f"{kind}.{name}: {needs} is missing; write {name}: {{model: {{layers: ..., hidden: ...}}}}"
                )
    for number, row in enumerate(grid["rows"]):
        if not isinstance(row, dict) or not row.keys() <= _ROW:
            raise LawError(f"rows[{number}]: {str(row)[:60]!r} given; keys {', '.join(sorted(_ROW))} would do")


def _names(grid: Mapping[str, Any], number: int, row: Mapping[str, Any], kind: str) -> list[str]:
    """The students or teachers of a row; all where it names none."""
    wanted = row.get(kind, list(grid[kind]))
    for name in wanted:
        if name not in grid[kind]:
            raise LawError(f"rows[{number}].{kind}: {name!r} is none of {', '.join(grid[kind])}")
    return list(wanted)


def _seeds(number: int, row: Mapping[str, Any]) -> list[int]:
    seeds = row.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise LawError(f"rows[{number}].seeds: {seeds!r} given; a list of whole numbers would do")
    return seeds
