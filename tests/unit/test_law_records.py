"""Records: what is refused, in which words, and what is grouped. Nothing is averaged in silence."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from megatron_capgap.law import curves, records
from megatron_capgap.law.records import LawError, Record
from tests.support.law import record, save, save_raw


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    some = [record(seed=2), record(seed=1)]
    assert records.read([save(some, tmp_path / "r.jsonl")]) == some[::-1]


def test_order_of_files_and_lines_does_not_matter(tmp_path: Path) -> None:
    some = [record(seed=seed, teacher_params_total=total) for seed in (1, 2) for total in (3_000_000, 2_900_000)]
    one = records.read([save(some, tmp_path / "one.jsonl")])
    two = records.read([save(some[2:][::-1], tmp_path / "a.jsonl"), save(some[:2], tmp_path / "b.jsonl")])
    assert one == two


@pytest.mark.parametrize("name", [n for n, v in asdict(record()).items() if n in records._REQUIRED])
def test_required_fields(tmp_path: Path, name: str) -> None:
    lines = [asdict(record()), asdict(record(seed=2))]
    for given in ({}, {name: None}):
        lines[1] = {k: v for k, v in asdict(record(seed=2)).items() if k != name} | given
        with pytest.raises(LawError, match=rf"r\.jsonl:2: {name} missing; "):
            records.read([save_raw(lines, tmp_path / "r.jsonl")])


def test_the_face_alone_is_a_record(tmp_path: Path) -> None:
    line = {name: value for name, value in asdict(record()).items() if name in records._REQUIRED}
    assert len(line) == 9
    (found,) = records.read([save_raw([line | {"note": "passed over"}], tmp_path / "r.jsonl")])
    assert found.objective is None and found.valid_loss == 3.25


BAD = {
    "valid_loss": (float("nan"), "valid_loss is nan; expected a finite number"),
    "flops": (float("inf"), "flops is inf; expected a finite number"),
    "tokens": (1.5, "tokens is 1.5; expected a whole number from 1 on"),
    "student_params": (0, "student_params is 0; expected a whole number from 1 on"),
    "teacher_params": (3_300_001, "teacher_params 3300001 is above teacher_params_total 3300000"),
    "seed": (True, "seed is True; expected a finite number"),
    "family": (7, "family is 7; expected a non-empty text"),
    "init": ("", "init is ''; expected a non-empty text"),
    "teacher_valid_loss": (400.0, "teacher_valid_loss is 400.0; a loss in nats per token is below 16"),
    "taught": ("no", "taught is 'no'; valid values: true, false"),
    "teacher_seed": (-1, "teacher_seed is -1; expected a whole number from 0 on"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_bounds(tmp_path: Path, name: str) -> None:
    value, message = BAD[name]
    path = save_raw([asdict(record()) | {name: value}], tmp_path / "r.jsonl")
    with pytest.raises(LawError) as error:
        records.read([path])
    assert str(error.value).startswith(f"{path}:1: {message}") and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(LawError, match=r"absent\.jsonl: cannot be read \(No such file"):
        records.read([tmp_path / "absent.jsonl"])
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(LawError, match="no records"):
        records.read([tmp_path / "r.jsonl"])
    (tmp_path / "r.jsonl").write_text("{'a': 1}\n")
    with pytest.raises(LawError, match=r"r\.jsonl:1: not JSON"):
        records.read([tmp_path / "r.jsonl"])
    (tmp_path / "r.jsonl").write_text("[1]\n")
    with pytest.raises(LawError, match=r"r\.jsonl:1: \[1\] is no record"):
        records.read([tmp_path / "r.jsonl"])


def test_duplicates_are_refused_even_with_equal_losses(tmp_path: Path) -> None:
    path = save([record(), record(seed=2), record(valid_loss=3.2, config_hash="def")], tmp_path / "r.jsonl")
    with pytest.raises(LawError, match=rf"{path}:3: the same student, teacher, seed 1 and conditions as {path}:1; "):
        records.read([path])
    with pytest.raises(LawError, match="the same student"):
        records.read([save([record()], tmp_path / "one.jsonl"), save([record()], tmp_path / "two.jsonl")])


def test_two_ways_to_count_are_refused(tmp_path: Path) -> None:
    path = save([record(), record(seed=2, student_params=1_500_000)], tmp_path / "r.jsonl")
    with pytest.raises(LawError, match=rf"{path}:2: sizes with and without embeddings are equal, but in {path}:1 they"):
        records.read([path])


def test_mixed_conditions_are_refused_with_the_choice() -> None:
    mixed = [record(), record(seed=2), record(tokens=6_000_000), record(init="pruned", tokens=6_000_000)]
    with pytest.raises(LawError) as error:
        records.select(mixed, {})
    assert str(error.value) == (
        "the records differ in init, tokens, so their losses cannot share a curve (init=pruned tokens=6000000: 1, "
        "init=random tokens=5000000: 2, init=random tokens=6000000: 1); "
        "choose with --where 'init=random' 'tokens=5000000'"
    )
    assert records.select(mixed, {"tokens": "5000000"}) == mixed[:2]
    assert records.select(mixed, {"tokens": "6000000", "init": "pruned"}) == mixed[3:]
    with pytest.raises(
        LawError, match="--where tokens=7: no record is left; there are tokens=5000000: 2, tokens=6000000"
    ):
        records.select(mixed, {"tokens": "7"})
    with pytest.raises(LawError, match="--where colour: no such condition"):
        records.select(mixed, {"colour": "red"})


def test_curves_use_complete_seeds_and_say_so() -> None:
    sizes = ((2_500_000, 3_300_000), (5_000_000, 6_000_000))
    some = [record(seed=s, teacher_params=t, teacher_params_total=n, valid_loss=s) for s in (1, 2) for t, n in sizes]
    (curve,), remarks = curves.curves(some, "non-embedding")
    assert curve.losses.tolist() == [[1, 1], [2, 2]] and not remarks
    (curve,), remarks = curves.curves(some[:3], "non-embedding")
    assert curve.losses.tolist() == [[1, 1]]
    assert remarks == ["student of 1,000,000: seeds 2 lack some of its 2 teachers and are left out"]
    with pytest.raises(LawError, match="no seed was run with all of its 2 teachers"):
        curves.curves([some[0], some[3]], "non-embedding")


def test_students_of_nearly_one_size_are_one_and_it_is_said() -> None:
    sizes = ((1_000_000, 2_500_000), (1_010_000, 5_000_000), (1_500_000, 2_500_000))
    some = [record(student_params=s, teacher_params=t, teacher_params_total=10**7) for s, t in sizes]
    found, remarks = curves.curves(some, "non-embedding")
    assert [len(curve.teachers) for curve in found] == [2, 1]
    assert remarks == ["students of 1,000,000 to 1,010,000 parameters count as one of 1,004,988"]


def table(path: Path, rows: list[dict[str, object]], delimiter: str = ",") -> str:
    columns = list(rows[0])
    lines = [delimiter.join(columns), *(delimiter.join(str(row[name]) for name in columns) for row in rows)]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("name", "delimiter"), [("r.csv", ","), ("r.tsv", "\t")])
def test_a_table_is_read_as_json_lines_are(tmp_path: Path, name: str, delimiter: str) -> None:
    """As spreadsheets write them: a byte order mark, CRLF, numbers with a point, empty cells, columns of others."""
    some = [record(seed=1, teacher_valid_loss=3.5, tokenizer="7"), record(seed=2, taught=False, init="pruned")]
    rows = [{**asdict(each), "Name": f'"a, run of {each.seed}"'} for each in some]
    rows = [{key: "" if value is None else value for key, value in row.items()} for row in rows]
    rows[0] |= {"tokens": "5000000.0", "taught": "TRUE"}
    found = records.read([table(tmp_path / name, rows, delimiter)])
    assert found == records.read([save(some, tmp_path / "r.jsonl")])


def test_columns_of_others_are_renamed(tmp_path: Path) -> None:
    rows = [{("eval/loss" if key == "valid_loss" else key): value for key, value in asdict(record()).items()}]
    rows[0] = {key: "" if value is None else value for key, value in rows[0].items()}
    path = table(tmp_path / "wandb.csv", rows)
    with pytest.raises(LawError, match=r"wandb\.csv:2: valid_loss missing"):
        records.read([path])
    assert records.read([path], {"eval/loss": "valid_loss"}) == [record()]
    with pytest.raises(LawError, match="--rename: loss is no field of a record; valid values: student_params"):
        records.read([path], {"eval/loss": "loss"})


TABLES = {
    "valid_loss\n-1\n": "missing",
    "a,b\n1,2,3\n": ":2: 3 cells under 2 columns",
    'a,b\n"1,2\n': "not a table",
}


@pytest.mark.parametrize("text", TABLES)
def test_tables_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(LawError) as error:
        records.read([path])
    assert str(error.value).startswith(f"{path}:") and TABLES[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_losses_that_cannot_be_name_their_line(tmp_path: Path) -> None:
    rows = [{key: value for key, value in asdict(record(seed=seed)).items() if value is not None} for seed in (1, 2)]
    for wrong, message in (
        (-0.1, "valid_loss is -0.1; expected more than 0"),
        (400, "valid_loss is 400.0; a loss in nats"),
        ("nan", "nan"),
    ):
        rows[1]["valid_loss"] = wrong
        with pytest.raises(LawError, match=message) as error:
            records.read([table(tmp_path / "r.csv", rows)])
        assert f"{tmp_path}/r.csv:3: " in str(error.value)


def test_every_field_has_its_unit() -> None:
    assert set(records.UNITS) == {field.name for field in fields(Record)}
    assert "\n  [teacher_seed] " in records.schema() and "\n  valid_loss " in records.schema()


def test_what_stands_twice_is_refused(tmp_path: Path) -> None:
    """A file that is given twice, a column, a key: none wins in silence."""
    path = save([record()], tmp_path / "r.jsonl")
    with pytest.raises(LawError, match="the same student, teacher, seed 1"):
        records.read([path, path])
    (tmp_path / "two.csv").write_text("seed,seed\n1,2\n")
    with pytest.raises(LawError, match=r"two\.csv:1: two columns are called 'seed'"):
        records.read([tmp_path / "two.csv"])
    (tmp_path / "two.jsonl").write_text('{"seed": 1, "seed": 2}\n')
    with pytest.raises(LawError, match=r"two\.jsonl:1: 'seed' is given twice"):
        records.read([tmp_path / "two.jsonl"])


def test_renames_that_do_nothing_or_too_much(tmp_path: Path) -> None:
    path = save([record()], tmp_path / "r.jsonl")
    with pytest.raises(LawError, match="--rename tI=tokens: no record has 'tI'; there are "):
        records.read([path], {"tI": "tokens"})
    with pytest.raises(LawError, match="--rename: flops and valid_loss would both be valid_loss"):
        records.read([path], {"flops": "valid_loss"})


def test_cells_keep_their_digits(tmp_path: Path) -> None:
    some = [record(seed=2**60 + 1, tokenizer="12345678901234567001"), record(seed=2**60 + 2, tokenizer="12e456")]
    rows = [{key: "" if value is None else value for key, value in asdict(each).items()} for each in some]
    found = records.read([table(tmp_path / "r.CSV", rows)])
    assert {(each.seed, each.tokenizer) for each in found} == {(each.seed, each.tokenizer) for each in some}


def test_runs_on_labels_alone_are_left_out_unless_chosen() -> None:
    some = [record(), record(taught=False, objective="1 cross_entropy")]
    assert records.select(some, {}) == some[:1]
    assert records.select(some, {"taught": "false"}) == some[1:]
    assert records.select(some[1:], {}) == some[1:]


RENAMES = {"config.*": "*", "summary.eval/loss": "valid_loss", "config.seq.tokens": "tokens"}


def wandb_runs() -> list[dict[str, object]]:
    """As `wandb.Api().runs` gives them: settings, the last value of each metric, a name."""
    found = []
    for seed in (1, 2):
        config = {key: value for key, value in asdict(record(seed=seed)).items() if value is not None}
        tokens, loss = config.pop("tokens"), config.pop("valid_loss")
        config |= {"seq": {"tokens": tokens}, "note": "it's a {run}", "resumed": None}
        summary = {"_step": 10, "_runtime": 3.5, "eval/loss": loss, "_wandb": {"runtime": 3}}
        found.append({"name": f"run-{seed}", "config": config, "summary": summary})
    return found


def test_runs_of_wandb_as_json(tmp_path: Path) -> None:
    """A list, as json.dump writes it; the same as lines."""
    wanted = [record(seed=1), record(seed=2)]
    (tmp_path / "runs.json").write_text(json.dumps(wandb_runs(), indent=1))
    assert records.read([tmp_path / "runs.json"], RENAMES) == wanted
    assert records.read([save_raw(wandb_runs(), tmp_path / "runs.jsonl")], RENAMES) == wanted
    places = records.located([tmp_path / "runs.json"], RENAMES)
    assert list(places.values()) == [f"{tmp_path}/runs.json: run 1", f"{tmp_path}/runs.json: run 2"]
    (tmp_path / "runs.json").write_text(json.dumps([*wandb_runs(), 7]))
    with pytest.raises(LawError, match=r"runs\.json: run 3: 7 is no record"):
        records.read([tmp_path / "runs.json"], RENAMES)


@pytest.mark.parametrize("convert", [str, json.dumps])
def test_runs_of_wandb_as_its_example_tabulates_them(tmp_path: Path, convert: Callable[[object], str]) -> None:
    """`pandas.DataFrame({"summary": ..., "config": ..., "name": ...}).to_csv(...)`: dictionaries as text."""
    path = tmp_path / "project.csv"

    def write(runs: list[dict[str, object]]) -> None:
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["", "summary", "config", "name"])
            told = [[convert(run["summary"]), convert(run["config"]), run["name"]] for run in runs]
            rows.writerows([number, *row] for number, row in enumerate(told))

    write(wandb_runs())
    assert records.read([path], RENAMES) == [record(seed=1), record(seed=2)]
    for wrong in (math.nan, math.inf, "NaN", 400):
        runs = wandb_runs()
        runs[1]["summary"]["eval/loss"] = wrong  # type: ignore[index]
        write(runs)
        with pytest.raises(LawError, match=r"project\.csv:3: valid_loss is "):
            records.read([path], RENAMES)


def test_the_table_of_wandbs_page(tmp_path: Path) -> None:
    """`Export as CSV` of the table of runs: a column for each setting and metric, every cell quoted."""
    columns = {"student_params": "model.student_params", "valid_loss": "eval/loss", "seed": "config.seed"}
    rows = []
    for seed in (1, 2):
        told = {key: value for key, value in asdict(record(seed=seed)).items() if value is not None}
        own = {"Name": f"run-{seed}", "State": "finished", "Notes": "-", "Tags": "", "Runtime": 3, "_step": 10}
        rows.append(own | {columns.get(key, key): value for key, value in told.items()})
    with (tmp_path / "wandb.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(rows)
    names = {column: field for field, column in columns.items()}
    assert records.read([tmp_path / "wandb.csv"], names) == [record(seed=1), record(seed=2)]


def test_renames_of_all_names_that_begin_alike(tmp_path: Path) -> None:
    path = save_raw(wandb_runs(), tmp_path / "runs.jsonl")
    with pytest.raises(LawError, match=r"--rename settings\.\*=\*: no field of a record begins with 'settings\.'"):
        records.read([path], {"settings.*": "*"})
    with pytest.raises(LawError, match=r"--rename seed=\*: \* on one side only"):
        records.read([path], {"seed": "*"})
    with pytest.raises(LawError, match=r"valid_loss missing"):
        records.read([path], {"config.*": "*", "config.seq.tokens": "tokens"})
