"""Records of distillation runs for the law: one line per run, or a row of a table from another source.

A file contains JSON lines; files ending in .csv or .tsv are tables whose first row names the columns, as exported by
W&B and spreadsheets. Fields are those of `Record`, in its units. Other columns are ignored; an empty cell is a missing
field.

Reading is strict: a missing field, a loss that is not a number, a duplicate run, or runs under different conditions
raise an error of one line with the file, the line, the field and the valid values. Nothing is silently left out or
averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_capgap.law.files import LawError, read_file

COUNTS = ("non-embedding", "total")
CONDITIONS = ("family", "init", "taught", "objective", "tokens", "valid_tokens", "tokenizer")
"""Fields that must be equal in all records of one fit: losses under different conditions cannot be compared."""
UNITS = {
    "student_params": "parameters without embeddings and LM head",
    "teacher_params": "the same of the teacher",
    "student_params_total": "all parameters",
    "teacher_params_total": "all parameters of the teacher",
    "family": "the student's architecture, any word",
    "tokens": "tokens the student was trained on",
    "seed": "of the student's run",
    "init": "random, fixed, pruned (from this teacher) or pruned_other (another training of it)",
    "valid_loss": "the student's, held out, nats a token; below 16",
    "objective": "what was minimised, any words",
    "flops": "of the run: student and teacher",
    "config_hash": "any word",
    "teacher_tokens": "tokens the teacher was trained on",
    "teacher_valid_loss": "the teacher's own, held out, nats a token",
    "valid_tokens": "held-out tokens",
    "tokenizer": "any word, equal for equal tokenizers",
    "teacher_seed": "which training of that teacher",
    "taught": "false where the student saw labels alone",
}
"""Descriptions and units of the fields for --help; `Record` has the details."""
EVERY = "*"
"""Wildcard in a rename: all names with the given prefix."""
MOST_LOSS = 16.0
"""Nats per token: the loss of a uniform distribution over nine million tokens. A larger loss means a failed run or
another unit."""


@dataclass(frozen=True)
class Record:
    """One distillation run: student, teacher, conditions and result.

    Fields with a default may be missing in a file (None: not recorded).
    """

    student_params: int
    """The student's parameters without embeddings and LM head."""
    teacher_params: int
    """The teacher's, counted in the same way."""
    student_params_total: int
    """All of the student's parameters."""
    teacher_params_total: int
    """All of the teacher's parameters."""
    family: str
    """The student's architecture."""
    tokens: int
    """Tokens that the student was trained on in this run."""
    seed: int
    """Decides data order and random weights."""
    init: str
    """The student's initialisation: `random` weights, `pruned` from this teacher, `pruned_other` from another training
    of that size, or one `fixed` checkpoint for all."""
    valid_loss: float
    """Cross-entropy on held-out text after the last step, nats per token."""
    objective: str | None = None
    """The objective, as text."""
    flops: float | None = None
    """Floating-point operations of the run: the student's training and the teacher's forward passes."""
    config_hash: str | None = None
    """Fingerprint of the resolved configuration without run_dir."""
    teacher_tokens: int | None = None
    """Tokens that the teacher was trained on in the run that its checkpoint comes from."""
    teacher_valid_loss: float | None = None
    """The teacher's own loss on the held-out text of that run, nats per token; separates a teacher's quality from its
    size."""
    valid_tokens: int | None = None
    """Held-out tokens that valid_loss is a mean over."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer."""
    teacher_seed: int | None = None
    """The seed of the teacher's training; distinguishes trainings of one size."""
    taught: bool = True
    """False if the student was trained on labels alone, without the teacher, from the initialisation `init`."""

    def sizes(self, count: str) -> tuple[int, int]:
        """(student, teacher) parameters, counted `non-embedding` or `total`."""
        assert count in COUNTS, count
        if count == "total":
            return self.student_params_total, self.teacher_params_total
        return self.student_params, self.teacher_params

    def line(self) -> str:
        """The record as a line of a .jsonl file."""
        return json.dumps(asdict(self)) + "\n"


_REQUIRED = tuple(field.name for field in fields(Record) if field.default is MISSING)
_ALL = {field.name: str(field.type).removesuffix(" | None") for field in fields(Record)}


def read(paths: Sequence[str | Path], names: Mapping[str, str] | None = None) -> list[Record]:
    """Reads .jsonl, .csv and .tsv files, or the record.json files of runs.

    Args:
        paths: of the files.
        names: names in the files -> fields of `Record`, if they differ.

    Returns:
        The records, in an order independent of the order of files and lines. Unknown fields are ignored.

    Raises:
        LawError: the first problem found.
    """
    return list(located(paths, names))


def located(paths: Sequence[str | Path], names: Mapping[str, str] | None = None) -> dict[Record, str]:
    """The records of `read`, in its order, with the file and line of each."""
    names = names or {}
    for wrong in set(names.values()) - set(_ALL) - {EVERY}:
        raise LawError(f"--rename: {wrong} is no field of a record; valid values: {', '.join(_ALL)}")
    contents = [each for path in paths for each in read_file(Path(path), _REQUIRED)]
    present = {name for _, content, _ in contents for name in content}
    names = _spelled_out(names, present)
    for wrong in set(names) - present:
        raise LawError(
            f"--rename {wrong}={names[wrong]}: no record has {wrong!r}; there are {', '.join(sorted(present))}"
        )
    for field in set(names.values()):
        if len(sources := sorted(name for name in present if names.get(name, name) == field)) > 1:
            raise LawError(
                f"--rename: {' and '.join(sources)} would both be {field}; leave one of them out of the files"
            )
    found = [
        (place, _parse(place, {names.get(name, name): value for name, value in content.items()}, text))
        for place, content, text in contents
    ]
    if not found:
        raise LawError(f"{', '.join(map(str, paths))}: no records; give the records of distill runs")
    _refuse_duplicates(found)
    _refuse_mixed_counts(found)
    return {record: place for place, record in sorted(found, key=lambda each: _order(each[1]))}


def _spelled_out(names: Mapping[str, str], present: set[str]) -> dict[str, str]:
    """Expands `config.*=*`: config.NAME is NAME, for every existing field NAME."""
    found: dict[str, str] = {}
    for name, field in names.items():
        if field == EVERY and name.endswith(EVERY):
            prefix = name.removesuffix(EVERY)
            inside = {each: each.removeprefix(prefix) for each in present if each.startswith(prefix)}
            renamed = {each: end for each, end in inside.items() if end in _ALL and each not in names}
            if not renamed:
                raise LawError(
                    f"--rename {name}={field}: no field of a record begins with {prefix!r} in the files; there are "
                    f"{', '.join(sorted(present))}"
                )
            found |= renamed
        elif field == EVERY:
            raise LawError(f"--rename {name}={field}: {EVERY} on one side only; write PREFIX.*=*")
        else:
            found[name] = field
    return found


def schema() -> str:
    """The fields of a record with their units, one per line."""
    lines = []
    for name, kind in _ALL.items():
        shown = name if name in _REQUIRED else f"[{name}]"
        lines.append(f"  {shown:24s} {kind:6s} {UNITS.get(name, '')}".rstrip())
    return "\n".join(lines)


def select(records: Sequence[Record], where: Mapping[str, str]) -> list[Record]:
    """The records under one set of conditions.

    Args:
        records: all records.
        where: required values of some `CONDITIONS`, as text; `taught` is true unless given.

    Raises:
        LawError: no record is left, or they still differ in a condition; the message gives the values and counts.
    """
    for name in where:
        if name not in CONDITIONS:
            raise LawError(f"--where {name}: no such condition; valid values: {', '.join(CONDITIONS)}")
    if "taught" not in where and any(record.taught for record in records):
        # Runs on labels alone are only counterparts: their students were not distilled.
        records = [record for record in records if record.taught]
    kept = [record for record in records if all(_text(record, name) == value for name, value in where.items())]
    if not kept:
        wanted = " ".join(f"{name}={value}" for name, value in where.items())
        raise LawError(f"--where {wanted}: no record is left; there are {_choice(records, tuple(where))}")
    mixed = [name for name in CONDITIONS if len({getattr(record, name) for record in kept}) > 1]
    if mixed:
        example = " ".join(f"'{name}={_commonest(kept, name)}'" for name in mixed)
        raise LawError(
            f"the records differ in {', '.join(mixed)}, so their losses cannot share a curve ({_choice(kept, mixed)}); "
            f"choose with --where {example}"
        )
    return kept


def conditions(records: Sequence[Record]) -> dict[str, Any]:
    """The conditions shared by all records of one selection."""
    return {name: getattr(records[0], name) for name in CONDITIONS}


def _plain(kind: str, cell: Any) -> Any:
    """Converts a table cell to the JSON value of its field's kind; returns it unchanged if that is not possible."""
    if kind == "bool":
        return {"true": True, "false": False}.get(cell.strip().lower(), cell)
    for convert in {"int": (int, float), "float": (float,)}.get(kind, ()):
        try:
            return convert(cell)
        except ValueError:
            pass
    return cell


def _parse(place: str, content: Mapping[str, Any], text: bool) -> Record:
    missing = [name for name in _REQUIRED if content.get(name) is None]
    if missing:
        raise LawError(f"{place}: {', '.join(missing)} missing; rewrite the run's record or remove the line")
    present = {name: content[name] for name in _ALL if content.get(name) is not None}
    values = {
        name: _value(
            place, name, _plain(_ALL[name], present[name]) if text and isinstance(present[name], str) else present[name]
        )
        for name in present
    }
    for whose in ("student", "teacher"):
        inner, total = values[f"{whose}_params"], values[f"{whose}_params_total"]
        if inner > total:
            raise LawError(
                f"{place}: {whose}_params {inner} is above {whose}_params_total {total}; "
                f"{whose}_params counts without embeddings and LM head"
            )
    return Record(**values)


def _value(place: str, name: str, value: Any) -> Any:
    """Checks the type and range of one field."""
    kind = _ALL[name]
    if kind == "bool":
        if not isinstance(value, bool):
            raise LawError(f"{place}: {name} is {value!r}; valid values: true, false")
        return value
    if kind == "str":
        if not isinstance(value, str) or not value:
            raise LawError(f"{place}: {name} is {value!r}; expected a non-empty text")
        return value
    if isinstance(value, str):
        raise LawError(f"{place}: {name} is the text {value!r}; expected a number without quotes")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise LawError(f"{place}: {name} is {value!r}; expected a finite number; correct it or remove the run")
    if name.endswith("valid_loss") and value > MOST_LOSS:
        raise LawError(f"{place}: {name} is {value!r}; a loss in nats per token is below {MOST_LOSS:g}; remove the run")
    lowest = 0 if name.endswith("seed") else 1 if kind == "int" else 0.0
    if value < lowest or (kind == "float" and value == 0) or (kind == "int" and value != int(value)):
        wanted = f"a whole number from {lowest} on" if kind == "int" else "more than 0"
        raise LawError(f"{place}: {name} is {value!r}; expected {wanted}")
    return int(value) if kind == "int" else float(value)


def _refuse_duplicates(found: Sequence[tuple[str, Record]]) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for place, record in found:
        names = (*CONDITIONS, "teacher_seed", "seed")
        key = (*(getattr(record, name) for name in names), *record.sizes("total"), *record.sizes("non-embedding"))
        if key in seen:
            raise LawError(
                f"{place}: the same student, teacher, seed {record.seed} and conditions as {seen[key]}; "
                "remove one of the two; teacher_seed distinguishes trainings of one teacher"
            )
        seen[key] = place


def _refuse_mixed_counts(found: Sequence[tuple[str, Record]]) -> None:
    """Refuses records that count parameters in two ways: sizes with and without embeddings are equal in some of them
    and different in others. If they are equal in all records, the counting is at least consistent."""
    equal: dict[bool, str] = {}
    for place, record in found:
        for inner, total in zip(record.sizes("non-embedding"), record.sizes("total"), strict=True):
            equal.setdefault(inner == total, place)
    if len(equal) > 1:
        raise LawError(
            f"{equal[True]}: sizes with and without embeddings are equal, but in {equal[False]} they differ: the "
            "records count in two ways; give student_params and teacher_params without embeddings everywhere"
        )


def _order(record: Record) -> tuple[Any, ...]:
    training = (record.teacher_seed or 0, record.teacher_valid_loss or 0.0, record.teacher_tokens or 0)
    return tuple(_text(record, name) for name in CONDITIONS), *record.sizes("total"), *training, record.seed


def _text(record: Record, name: str) -> str:
    value = getattr(record, name)
    return "not told" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _commonest(records: Sequence[Record], name: str) -> str:
    values = [_text(record, name) for record in records]
    return max(sorted(set(values)), key=values.count)


def _choice(records: Sequence[Record], names: Sequence[str]) -> str:
    """Number of records per value, for example `tokens=1000: 24, tokens=2000: 3`."""
    counts: dict[str, int] = {}
    for record in records:
        key = " ".join(f"{name}={_text(record, name)}" for name in names)
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{key}: {count}" for key, count in sorted(counts.items()))
