"""Expands a grid of students, teachers and seeds into runs with stage, configuration and dependencies.

    out: work/sweep                                   # folder of the sweep
    common: {device: cpu, data: {...}, ...}           # keys of every run
    teach: {train: {steps: 400}, ...}                 # keys of the teachers' runs (adapt)
    start: {train: {steps: 100}, ...}                 # keys of the runs that make fixed starts (adapt)
    prune: {prune: {batches: 8}, ...}                 # keys of the runs that prune students from teachers (prune)
    distill: {train: {steps: 200}, ...}               # keys of the students' runs
    teachers: {t1: {model: {...}, seeds: [1, 2]}, t2: {checkpoint: RUN}}    # seeds: that many trainings of t1
    students: {s1: {model: {...}}}                    # with init fixed also {checkpoint: RUN}
    rows:                                             # each: students x teachers x seeds
      - {init: random, seeds: [1, 2]}
      - {init: fixed, students: [s1], seeds: [1, 2]}
      - {init: pruned, seeds: [1, 2]}                 # from each teacher, to the shape of the student's model
      - {init: pruned_other, seeds: [1]}              # from another training of that teacher; needs at least two
    ranks: 1                                          # processes of one run on this machine; default 1
    slurm: ["--time=02:00:00", "--gres=gpu:1"]        # options for sbatch

out, common, distill, teachers, students and rows are required. A row without students or teachers uses all of them, and
every training of a teacher. Each start (for pruned ones, each pair of student and teacher) is also trained on labels
alone, once per seed, to separate the effect of teaching from that of the start; in a row, `labels: false` disables this
and `labels: only` leaves out the runs with a teacher, to complete an earlier sweep.

Paths are relative to the folder that make_sweep is called in, as in every configuration.

A teacher or student may have its own sections (`train: {...}`), which override those of its kind of run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_capgap.law.files import LawError

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
"""The keys of a grid and their types; the module docstring describes them (shown by tools/make_sweep.py --help)."""
_NEEDED = ("out", "common", "distill", "teachers", "students", "rows")
_ROW = {"init", "students", "teachers", "seeds", "labels"}
_LABELS = (True, False, "only")
LABELS = "labels-"
"""Prefix of the names of runs without a teacher."""
_LABELS_ALONE = {"objective": {"divergence_weight": 0.0, "cross_entropy_weight": 1.0, "matching": []}}


@dataclass(frozen=True)
class SweepRun:
    """One run of the sweep."""

    name: str
    stage: str
    config: dict[str, Any]
    after: tuple[str, ...] = ()
    """Names of the runs whose checkpoints it reads."""


@dataclass(frozen=True)
class Sweep:
    """All runs in dependency order."""

    out: str
    cells: tuple[SweepRun, ...]
    ranks: int
    """Processes of one run on this machine."""
    slurm: tuple[str, ...]
    """Options for sbatch."""

    def phases(self) -> list[list[SweepRun]]:
        """Groups of runs: those without dependencies, those that need only these, and so on."""
        depth: dict[str, int] = {}
        for cell in self.cells:
            depth[cell.name] = 1 + max((depth[name] for name in cell.after), default=-1)
        return [[c for c in self.cells if depth[c.name] == level] for level in range(max(depth.values()) + 1)]


def expand(grid: Any) -> Sweep:
    """Checks a grid and expands it into runs.

    Args:
        grid: contents of the YAML file; see the module docstring.

    Raises:
        LawError: a key is missing, unknown or of the wrong type, or a name is not in the grid.
    """
    _check(grid)
    grid, trainings = trained_apart(grid)
    cells: dict[str, SweepRun] = {}
    for name, teacher in grid["teachers"].items():
        if teacher.get("checkpoint") is None:
            made = _cell(grid, f"teacher-{name}", "adapt", "teach", teacher, student={"model": teacher["model"]})
            cells[made.name] = made
    for number, row in enumerate(grid["rows"]):
        start = STARTS.get(row.get("init"))
        if start is None:
            raise LawError(f"rows[{number}].init: {row.get('init')!r} given; valid values: {', '.join(STARTS)}")
        for made in _row(grid, number, row, start, trainings):
            if made.name in cells and made.name.startswith(LABELS):
                continue
            if made.stage == "distill" and made.name in cells:
                raise LawError(f"rows[{number}]: {made.name} is in an earlier row already; keep it in one of them")
            cells[made.name] = made
    return Sweep(grid["out"], _in_order(grid["out"], cells), grid.get("ranks", 1), tuple(grid.get("slurm", ())))


def _row(
    grid: Mapping[str, Any], number: int, row: Mapping[str, Any], start: Start, trainings: Mapping[str, list[str]]
) -> Iterator[SweepRun]:
    """The runs of one row, including those that make its starts."""
    labels = row.get("labels", True)
    if labels not in _LABELS:
        raise LawError(f"rows[{number}].labels: {labels!r} given; valid values: true, false, only")
    for student in _names(number, row, "students", {name: [name] for name in grid["students"]}):
        for teacher in _names(number, row, "teachers", trainings):
            begun = start(grid, student, teacher, trainings)
            if begun is None:
                raise LawError(
                    f"rows[{number}]: init {row['init']} needs a second training of {teacher}; give it seeds: [1, 2]"
                )
            yield from begun.made
            for seed in _seeds(number, row):
                if labels != "only":
                    name = f"{row['init']}-{student}-{teacher}-seed{seed}"
                    yield _student(grid, name, student, teacher, seed, begun)
                if labels:
                    # Named after the teacher that the start was made from, because the run itself has no teacher.
                    init = f"pruned-{student}-{begun.source}" if begun.source else f"{row['init']}-{student}"
                    name, nominal = f"{LABELS}{init}-seed{seed}", begun.source or teacher
                    yield _student(grid, name, student, nominal, seed, begun, **_LABELS_ALONE)


def trained_apart(grid: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The grid with every training of a teacher as a separate teacher, and the names of these by teacher."""
    teachers, names = {}, {}
    for name, entry in grid["teachers"].items():
        if "seeds" not in entry:
            teachers[name], names[name] = entry, [name]
            continue
        if entry.get("checkpoint") is not None:
            raise LawError(f"teachers.{name}.seeds: a checkpoint is one training; remove seeds, or give a model")
        seeds = _whole_numbers(f"teachers.{name}.seeds", entry["seeds"])
        rest = {key: value for key, value in entry.items() if key != "seeds"}
        apart = {f"{name}-training{seed}": {**rest, "seed": seed} for seed in seeds}
        teachers |= apart
        names[name] = list(apart)
    return {**grid, "teachers": teachers}, names


def _in_order(out: str, cells: Mapping[str, SweepRun]) -> tuple[SweepRun, ...]:
    """The runs in dependency order; a run depends on the runs it names and on those whose folder it reads."""
    folders = {cell.config["run_dir"]: cell.name for cell in cells.values()}
    placed: dict[str, SweepRun] = {}

    def place(cell: SweepRun, behind: tuple[str, ...]) -> None:
        if cell.name in behind:
            raise LawError(f"{' needs '.join((*behind, cell.name))}: a run cannot need itself")
        read = [(cell.config.get(role) or {}).get("checkpoint") or "" for role in ("student", "teacher")]
        found = [name for path in read for folder, name in folders.items() if f"{path}/".startswith(f"{folder}/")]
        after = tuple(dict.fromkeys((*cell.after, *found)))
        for name in after:
            if name not in placed:
                place(cells[name], (*behind, cell.name))
        placed.setdefault(cell.name, replace(cell, after=after))

    for cell in cells.values():
        place(cell, ())
    return tuple(placed.values())


def run_dir(out: str, name: str) -> str:
    """The run directory of a run of the sweep."""
    return f"{out}/runs/{name}"


@dataclass(frozen=True)
class StudentStart:
    """The start (initialisation) of a student."""

    section: dict[str, Any]
    """The run's `student`."""
    source: str | None = None
    """The teacher that it was pruned from; None if every teacher has the same start."""
    made: tuple[SweepRun, ...] = ()
    """The runs that make it."""
    after: tuple[str, ...] = ()
    """Names of the runs that it needs."""


def _random(grid: Mapping[str, Any], student: str, teacher: str, trainings: Mapping[str, list[str]]) -> StudentStart:
    """Random weights that depend only on the seed: the same under every teacher."""
    return StudentStart({"model": grid["students"][student]["model"]})


def _fixed(grid: Mapping[str, Any], student: str, teacher: str, trainings: Mapping[str, list[str]]) -> StudentStart:
    """One checkpoint for all teachers: the student's own, or a short training without a teacher."""
    entry = grid["students"][student]
    if entry.get("checkpoint") is not None:
        return StudentStart({"checkpoint": entry["checkpoint"]})
    start = _cell(grid, f"start-{student}", "adapt", "start", entry, student={"model": entry["model"]})
    return StudentStart({"checkpoint": start.config["run_dir"]}, None, (start,), (start.name,))


def _pruned(grid: Mapping[str, Any], student: str, teacher: str, trainings: Mapping[str, list[str]]) -> StudentStart:
    """Pruned from each teacher, as in the paper."""
    shape = grid["students"][student]["model"]
    target = {name: shape[name] for name in ("layers", "hidden", "heads", "kv_heads", "ffn") if name in shape}
    checkpoint, after = _teacher(grid, teacher)
    own = {"teacher": {"checkpoint": checkpoint}, "prune": target}
    pruned = _cell(grid, f"prune-{student}-{teacher}", "prune", "prune", {}, after=after, **own)
    return StudentStart({"checkpoint": pruned.config["run_dir"]}, teacher, (pruned,), (pruned.name,))


def _pruned_other(
    grid: Mapping[str, Any], student: str, teacher: str, trainings: Mapping[str, list[str]]
) -> StudentStart | None:
    """Pruned from the next training of the same teacher; None if there is only one."""
    same = next(names for names in trainings.values() if teacher in names)
    other = same[(same.index(teacher) + 1) % len(same)]
    return _pruned(grid, student, other, trainings) if other != teacher else None


Start = Callable[[Mapping[str, Any], str, str, Mapping[str, list[str]]], StudentStart | None]
STARTS: dict[str, Start] = {
    "random": _random,
    "fixed": _fixed,
    "pruned": _pruned,
    "pruned_other": _pruned_other,
}
"""By `init`: (grid, student, teacher, trainings by teacher) -> the student's start."""


def _student(
    grid: Mapping[str, Any], name: str, student: str, teacher: str, seed: int, begun: StudentStart, **own: Any
) -> SweepRun:
    """One training of a student, distilled from a teacher unless `own` overrides it."""
    checkpoint, trained = _teacher(grid, teacher)
    taught = {"teacher": {"checkpoint": checkpoint}, "seed": seed, "student": begun.section, **own}
    return _cell(grid, name, "distill", "distill", grid["students"][student], after=(*trained, *begun.after), **taught)


def _teacher(grid: Mapping[str, Any], teacher: str) -> tuple[str, tuple[str, ...]]:
    """A teacher's checkpoint, and the run that makes it, if it is part of the grid."""
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
) -> SweepRun:
    """A run from the common keys, those of its kind, those of its model, and its own; later ones override."""
    config: dict[str, Any] = {"run_dir": run_dir(grid["out"], name)}
    brought = {key: value for key, value in entry.items() if key not in ("model", "checkpoint")}
    for keys in (grid["common"], grid.get(kind, {}), brought, own):
        config = _merged(config, keys)
    return SweepRun(name, stage, config, after)


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
            raise LawError(f"{key}: {str(value)[:40]!r} given; expected a {SECTIONS[key].__name__}")
    for key in _NEEDED:
        if not grid.get(key):
            raise LawError(f"{key}: missing or empty; a grid has {', '.join(_NEEDED)}")
    for kind in ("teachers", "students"):
        for name, entry in grid[kind].items():
            has_model = isinstance(entry, dict) and {"model", "checkpoint"} & entry.keys()
            if not has_model or (kind == "students" and "model" not in entry):
                needs = "a model or a checkpoint" if kind == "teachers" else "a model"
                raise LawError(
                    f"{kind}.{name}: {needs} is missing; write {name}: {{model: {{layers: ..., hidden: ...}}}}"
                )
    for number, row in enumerate(grid["rows"]):
        if not isinstance(row, dict) or not row.keys() <= _ROW:
            raise LawError(f"rows[{number}]: {str(row)[:60]!r} given; valid keys: {', '.join(sorted(_ROW))}")


def _names(number: int, row: Mapping[str, Any], kind: str, known: Mapping[str, list[str]]) -> list[str]:
    """The students, or the trainings of teachers, of a row; all if it names none."""
    wanted = row.get(kind, list(known))
    for name in wanted:
        if name not in known:
            raise LawError(f"rows[{number}].{kind}: {name!r} is unknown; valid values: {', '.join(known)}")
    return [each for name in wanted for each in known[name]]


def _seeds(number: int, row: Mapping[str, Any]) -> list[int]:
    return _whole_numbers(f"rows[{number}].seeds", row.get("seeds"))


def _whole_numbers(key: str, seeds: Any) -> list[int]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise LawError(f"{key}: {seeds!r} given; expected a list of whole numbers")
    return seeds
