"""tools/fit_law.py: what it writes, the same bytes for the same records, predictions, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_capgap.law import plot
from tests.support import law as made
from tests.support.processes import ROOT, environment
from tools import fit_law

RESULTS = ROOT / "examples" / "law_sweep" / "results"
WRITTEN = ["compute.png", "curse.png", "law.json", "law.png", "report.md"]


@pytest.fixture
def records(tmp_path: Path) -> str:
    return made.save(made.draw(made.exact, np.random.default_rng(3), noise=0.003), tmp_path / "records.jsonl")


def fit(records: str, out: Path, *words: str) -> dict[str, Any]:
    assert fit_law.main(["--records", records, "--out", str(out), *words]) == 0
    return json.loads((out / "law.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert fit_law.main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("fit_law: error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_without_the_libraries_one_line_says_what_brings_them(package: str) -> None:
    program = f"import sys; sys.modules['{package}'] = None; from tools import fit_law"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    said = f"fit_law: error: {package} is not installed; pip install -e '.[plot]' brings it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_everything_is_written_and_says_the_law(records: str, tmp_path: Path, capsys: Any) -> None:
    found = fit(records, tmp_path / "law")
    assert sorted(path.name for path in (tmp_path / "law").iterdir()) == WRITTEN
    assert found["chosen"] == "proportional" and len(found["students"]) == 4
    low, high = found["laws"]["proportional"]["intervals"]["k"]
    assert low < 2.5 < high and high - low < 1
    report = (tmp_path / "law" / "report.md").read_text()
    assert f"**T = {found['laws']['proportional']['k']:.3g} S**" in report
    assert "lies within the interval of k found here" in report
    assert "law: T = 2." in capsys.readouterr().out


def test_the_same_records_give_the_same_bytes(records: str, tmp_path: Path) -> None:
    lines = Path(records).read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(lines)))
    words = ("--student-params", "12M", "--tokens", "1e9")
    fit(records, tmp_path / "one", *words)
    fit(str(turned), tmp_path / "two", *words)
    for name in WRITTEN:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def taught(loss_of: Any, init: str = "random") -> list[Any]:
    """Records in which every teacher has a loss of its own."""
    drawn = made.draw(made.exact, np.random.default_rng(3), noise=0.003, init=init)
    return [replace(each, teacher_valid_loss=loss_of(each)) for each in drawn]


def test_teachers_are_told_and_a_weak_one_is_named(tmp_path: Path) -> None:
    better = taught(lambda each: 3.0 - each.teacher_params * 1e-9)
    found = fit(made.save(better, tmp_path / "better.jsonl"), tmp_path / "better")
    assert [each["size"] for each in found["teachers"]] == sorted({each.teacher_params for each in better})
    assert found["teachers"][0] == {"size": 1_500_000, "tokens": 10_000_000, "loss": 2.9985}
    assert "| 1.5M | 10,000,000 tokens | 2.9985 |" in (tmp_path / "better" / "report.md").read_text()
    assert not any("by its own loss" in text for text in found["remarks"])
    weak = taught(lambda each: 3.0 + abs(each.teacher_params - 18_000_000) * 1e-9)
    found = fit(made.save(weak, tmp_path / "weak.jsonl"), tmp_path / "weak")
    assert any("best teacher by its own loss is that of 18,000,000 parameters" in text for text in found["remarks"])


def test_two_teachers_of_one_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("teacher_tokens", 20_000_000), ("teacher_valid_loss", 2.5)):
        some = made.draw(made.exact, np.random.default_rng(3), noise=0.003)
        other = [
            replace(each, **{name: value}) if each.seed == 2 and each.teacher_params == 4e6 else each for each in some
        ]
        said = refused(capsys, "--records", made.save(other, tmp_path / "two.jsonl"), "--out", str(tmp_path / "law"))
        assert f"teacher of 4,000,000 parameters: {name} is " in said and "keep the records of one of them" in said


def test_seeds_that_leave_the_start_alone_are_told(tmp_path: Path) -> None:
    pruned = made.save(taught(lambda each: None, init="pruned"), tmp_path / "pruned.jsonl")
    assert "students began from pruned weights" in fit(pruned, tmp_path / "law")["remarks"][0]


@pytest.mark.parametrize("init, folder", [("pruned", RESULTS), ("fixed", RESULTS / "fixed")])
def test_the_law_of_the_committed_runs_is_what_their_records_give(init: str, folder: Path, tmp_path: Path) -> None:
    fit(str(RESULTS / "records.jsonl"), tmp_path, "--where", f"init={init}")
    for name in ("law.json", "report.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_prediction_with_interval_catalogue_and_cost(records: str, tmp_path: Path, capsys: Any) -> None:
    found = fit(records, tmp_path / "law", "--student-params", "30M", "--tokens", "1e9", "--count", "non-embedding")
    told = found["prediction"]
    assert told["teacher"] == pytest.approx(30e6 * found["laws"]["proportional"]["k"], rel=1e-4)
    assert told["interval"][0] < 75e6 < told["interval"][1]
    # 2.5 x 30M = 75M: GPT-2 small and Pythia 160M have 85.1M without embeddings, Pythia 70M has 18.9M.
    assert told["candidates"][0]["name"] in ("gpt2/small", "pythia/160m")
    assert told["candidates"][0]["teacher"] == pytest.approx(85.06e6, rel=1e-4)
    assert all(each["teacher"] > 30e6 for each in told["candidates"])
    assert told["beyond"] == pytest.approx(30 / 8) and "this is an extrapolation" in found["remarks"][-1]
    assert found["cost"]["search"] > found["cost"]["chosen"] and found["cost"]["breaks_even"] >= 1
    assert "Closest in the catalogue is **" in (tmp_path / "law" / "report.md").read_text()
    assert "note: the student of 30,000,000 parameters is 3.75 times beyond" in capsys.readouterr().out
    within = fit(records, tmp_path / "within", "--student-params", "3M")
    assert within["prediction"]["beyond"] == 1 and within["remarks"] == []


def test_regret_is_what_the_curves_say(tmp_path: Path) -> None:
    path = made.save(made.draw(made.exact, np.random.default_rng(0), noise=0.0), tmp_path / "records.jsonl")
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text("a: {b: {layers: 4, hidden: 256, heads: 4, ffn: 768, vocab: 100}}\n")
    found = fit(path, tmp_path / "law", "--student-params", "1M", "--catalogue", str(catalogue))
    (each,) = found["prediction"]["candidates"]
    size = 4 * (4 * 256**2 + 3 * 256 * 768 + 2 * 256) + 256
    assert each["teacher"] == pytest.approx(size, rel=1e-5)
    assert each["regret"] == pytest.approx(0.05 * np.log(size / 2.5e6) ** 2, rel=1e-4)


def test_without_a_law_nothing_is_foretold(tmp_path: Path, capsys: Any) -> None:
    path = made.save(made.draw(made.no_optimum, np.random.default_rng(0), noise=0.001), tmp_path / "records.jsonl")
    found = fit(path, tmp_path / "law", "--student-params", "3M")
    assert found["laws"] == {} and found["chosen"] is None and found["prediction"] is None
    assert {each["status"] for each in found["students"]} == {"no curse seen"}
    assert "these runs give no law" in (tmp_path / "law" / "report.md").read_text()
    assert "note: no teacher can be foretold for a student of 3M, for there is no law" in capsys.readouterr().out


def test_one_student_is_warned_of(records: str, tmp_path: Path) -> None:
    one = made.draw(made.exact, np.random.default_rng(1), noise=0.002, students=[2e6])
    found = fit(made.save(one, tmp_path / "one.jsonl"), tmp_path / "law", "--student-params", "3M")
    assert list(found["laws"]) == ["proportional"]
    assert "the law stands on 1 student(s); with fewer than 3 it is hardly more than a guess" in found["remarks"]


def test_totals_are_a_choice(records: str, tmp_path: Path) -> None:
    found = fit(records, tmp_path / "law", "--count", "total")
    assert found["students"][0]["student_params"] == 1.3e6
    assert found["laws"]["proportional"]["k"] == pytest.approx(2.5, rel=0.1)


def test_mixed_conditions_are_refused_and_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = made.draw(made.exact, np.random.default_rng(3), noise=0.003)
    both = made.save([*some, *(replace(each, init="pruned") for each in some)], tmp_path / "both.jsonl")
    out = tmp_path / "law"
    assert "the records differ in init" in refused(capsys, "--records", both, "--out", str(out))
    assert not out.exists()
    assert fit(both, out, "--where", "init=pruned")["conditions"]["init"] == "pruned"


def test_bad_words_are_refused(records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--records", records, "--out", str(tmp_path / "law"), "--student-params", "3M", "--catalogue")
    assert "cannot be read" in refused(capsys, *words, str(tmp_path / "absent.yaml"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("a: {b: {layers: 4}}\n")
    assert "a.b.hidden: " in refused(capsys, *words, str(wrong))
    for bad in (["--student-params", "big"], ["--tokens", "1B"], ["--mfu", "40"]):
        with pytest.raises(SystemExit):
            fit_law.main(["--records", records, "--out", str(tmp_path / "law"), *bad])
    assert not (tmp_path / "law").exists()


KNOWN = {  # from the models' own cards: all parameters
    "gpt2/small": 124_439_808,
    "gpt2/xl": 1_557_611_200,
    "pythia/70m": 70_426_624,
    "pythia/1b": 1_011_781_632,
    "pythia/12b": 11_846_072_320,
    "llama-2/7b": 6_738_415_616,
    "llama-2/70b": 68_976_648_192,
    "llama-3/1b": 1_235_814_400,
    "llama-3/8b": 8_030_261_248,
    "qwen2.5/0.5b": 494_032_768,
    "qwen2.5/7b": 7_615_616_512,
    "qwen3/0.6b": 596_049_920,
    "qwen3/8b": 8_190_735_360,
}


def test_the_catalogue_counts_as_the_models_cards_do() -> None:
    sizes = fit_law.read_catalogue(fit_law.CATALOGUE, "total")
    assert {name: sizes[name] for name in KNOWN} == KNOWN
    inner = fit_law.read_catalogue(fit_law.CATALOGUE, "non-embedding")
    assert inner["pythia/70m"] == 18_915_328 and inner["pythia/12b"] == 11_327_027_200


def test_the_pictures_show_something(records: str, tmp_path: Path) -> None:
    fit(records, tmp_path / "law")
    for name in ("curse", "law", "compute"):
        picture = imread(tmp_path / "law" / f"{name}.png")
        assert picture.shape[0] >= 800 and picture.shape[1] >= 1200
        assert len(np.unique(picture[::3, ::3, :3].reshape(-1, 3), axis=0)) > 50
    assert plot.pareto([(3, 2.0), (1, 3.0), (2, 3.5), (4, 2.0), (5, 1.0)]) == [(1, 3.0), (3, 2.0), (5, 1.0)]
