"""tools/fit_law.py: what it writes, the same bytes for the same records, predictions, and what it refuses."""

import base64
import json
import re
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
WRITTEN = ["compute.png", "curse.png", "law.json", "law.png", "optimum.png", "report.html", "report.md"]


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
    said = f"fit_law: error: {package} is not installed; run pip install -e '.[plot]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_everything_is_written_and_says_the_law(records: str, tmp_path: Path, capsys: Any) -> None:
    found = fit(records, tmp_path / "law")
    assert sorted(path.name for path in (tmp_path / "law").iterdir()) == WRITTEN
    assert found["format"] == 2 and found["verdict"] == "law" and found["advice"] is None
    assert [each["verdict"] for each in found["students"]] == ["interior"] * 4
    for each in found["students"]:
        assert each["probability"] == each["probabilities"]["interior"] >= 0.9
        low, high = each["best_teacher_interval"]
        assert low < 2.5 * each["student_params"] < high and each["best_ratio"] == pytest.approx(2.5, rel=0.1)
    assert found["paper_reading"]["chosen"] == "proportional"
    assert found["paper_reading"]["laws"]["proportional"]["k"] == pytest.approx(2.5, rel=0.1)
    report = (tmp_path / "law" / "report.md").read_text()
    assert "**Law.** 4 of 4 students have a best teacher inside the grid." in report
    assert "## The paper's reading" in report and "do not act on it." in report
    assert "law: 4 of 4 students have a best teacher inside the grid" in capsys.readouterr().out


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


def test_teachers_are_told(tmp_path: Path) -> None:
    told = taught(lambda each: 3.0 - each.teacher_params * 1e-9)
    found = fit(made.save(told, tmp_path / "told.jsonl"), tmp_path / "law")
    assert [each["size"] for each in found["teachers"]] == sorted({each.teacher_params for each in told})
    assert found["teachers"][0] == {"size": 1_500_000, "seed": None, "tokens": 10_000_000, "loss": 2.9985}
    assert "| 1.5M | - | 10,000,000 tokens | 2.9985 |" in (tmp_path / "law" / "report.md").read_text()
    assert found["remarks"] == [
        "9 of 9 teacher sizes were trained once: how much trainings differ is inferred from the curves, not seen; "
        "train each size at least twice"
    ]


def test_two_trainings_of_one_size_are_two_teachers(tmp_path: Path) -> None:
    some = made.draw(made.exact, np.random.default_rng(3), noise=0.003)
    both = [replace(each, teacher_seed=seed, teacher_valid_loss=2.5 + seed) for each in some for seed in (1, 2)]
    unnamed = made.save([replace(each, teacher_seed=None) for each in both], tmp_path / "unnamed.jsonl")
    assert fit_law.main(["--records", unnamed, "--out", str(tmp_path / "law")]) == 2
    found = fit(made.save(both, tmp_path / "two.jsonl"), tmp_path / "law")
    assert [each["seed"] for each in found["teachers"]] == [1, 2] * 9
    assert found["remarks"] == [] and found["verdict"] == "law"
    (reason,) = found["paper_reading"]["remarks"]
    assert "two runs" in reason and found["paper_reading"]["chosen"] is None


def test_an_odd_run_is_named_with_its_line(tmp_path: Path) -> None:
    some = made.draw(made.exact, np.random.default_rng(3), noise=0.003)
    some[20] = replace(some[20], valid_loss=some[20].valid_loss + 0.06)
    odd, *others = fit(made.save(some, tmp_path / "odd.jsonl"), tmp_path / "law")["remarks"]
    size = f"student {some[20].student_params:,} under teacher {some[20].teacher_params:,}, seed {some[20].seed}"
    assert odd.startswith(f"run of {size} (odd.jsonl:21): its loss of {some[20].valid_loss:.4f} is 0.0")
    assert "nats above what all other runs expect" in odd and not any("all other runs" in text for text in others)


def test_what_pruned_starts_leave_open_is_told(tmp_path: Path) -> None:
    pruned = made.save(taught(lambda each: 3.0, init="pruned"), tmp_path / "pruned.jsonl")
    assert any(
        "both the cost of pruning and the effect of teaching" in each
        for each in fit(pruned, tmp_path / "law")["remarks"]
    )


def test_gaps_and_missing_losses_are_told(tmp_path: Path) -> None:
    some = made.draw(made.exact, np.random.default_rng(3), noise=0.003, students=[1e6, 2e6])
    found = fit(made.save(some[1:], tmp_path / "gap.jsonl"), tmp_path / "law")
    assert "student of 1,000,000: 1 of its teacher and seed pairs were not run" in found["remarks"]
    assert "2 student(s); the word law needs interior optima of 3" in found["remarks"]
    assert any("9 of 9 trainings of teachers come without teacher_valid_loss" in text for text in found["remarks"])


@pytest.mark.parametrize("init, folder", [("pruned", RESULTS), ("fixed", RESULTS / "fixed")])
def test_the_committed_study_is_what_its_records_give(init: str, folder: Path, tmp_path: Path) -> None:
    """What is drawn from a posterior may differ in its last digits on another processor."""
    words = ("--compare",) if init == "pruned" else ()
    found = fit(str(RESULTS / "records.jsonl"), tmp_path, "--where", f"init={init}", *words)
    there = json.loads((folder / "law.json").read_text())
    for one, other in zip(found.pop("students"), there.pop("students"), strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=0.05)
        assert one["best_teacher_interval"] == pytest.approx(other["best_teacher_interval"], rel=0.2)
    for name in ("scales", "teacher_noise"):
        assert found.pop(name) == pytest.approx(there.pop(name), rel=0.15)
    for one, other in zip(found.pop("models"), there.pop("models"), strict=True):
        assert one.pop("model") == other.pop("model")
        for key, value in one.items():
            assert value == other[key] or value == pytest.approx(other[key], rel=0.1, abs=0.002), key
    assert found == there


def test_the_pilot_shows_no_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit(str(RESULTS / "records.jsonl"), tmp_path, "--where", "init=pruned", "--student-params", "3B")
    assert found["verdict"] == "no law"
    assert "interior" not in {each["verdict"] for each in found["students"]}
    assert found["teacher_noise"] == pytest.approx(0.012, abs=0.004)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("no recommendation: nothing here can tell: a student of 3B is 3,849 times outside")
    assert found["advice"]["refusal"] in (tmp_path / "report.md").read_text()


def test_advice_comes_first(records: str, tmp_path: Path, capsys: Any) -> None:
    catalogue = tmp_path / "catalogue.yaml"
    shapes = {"small": {"hidden": 384, "ffn": 1536}, "large": {"hidden": 768, "ffn": 3072}}
    lines = {name: {"layers": 4, "heads": 4, "vocab": 100, **shape} for name, shape in shapes.items()}
    catalogue.write_text(json.dumps({"a": lines}))
    words = ("--student-params", "3M", "--tokens", "1e9", "--catalogue", str(catalogue))
    told = fit(records, tmp_path / "law", *words)["advice"]
    first, second = told["candidates"]
    assert (first["name"], second["name"]) == ("a/small", "a/large") and told["refusal"] is None
    assert first["teacher"] == 4 * (4 * 384**2 + 3 * 384 * 1536 + 2 * 384) + 384
    assert first["flops"] == pytest.approx((6 * 3e6 + 2 * first["teacher"]) * 1e9, rel=1e-5)
    true = [made.exact(3e6, each["teacher"]) - made.exact(3e6, 7.5e6) for each in (first, second)]
    assert [first["regret"], second["regret"]] == pytest.approx(true, abs=0.003)
    assert told["within"][0] < 7.5e6 < told["within"][1]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "distil, or train on labels alone for the same FLOPs: these runs cannot tell, for there are no runs on labels "
        "alone from the starts of taught ones"
    )
    assert said[1].startswith("teacher for 3M: a/small, 9.44M   expected regret 0.00")
    low, middle, high = first["losses"]
    assert low < middle < high and middle == pytest.approx(made.exact(3e6, first["teacher"]), abs=0.03)
    assert "price.png" in said[-1] and imread(tmp_path / "law" / "price.png").shape[0] >= 800
    report = (tmp_path / "law" / "report.md").read_text()
    assert report.index("## The teacher for a student of 3M") < report.index("## Verdict")
    assert "**a/small** (9.44M): expected regret" in report


def test_without_an_optimum_there_is_no_law(tmp_path: Path, capsys: Any) -> None:
    path = made.save(made.draw(made.no_optimum, np.random.default_rng(0), noise=0.001), tmp_path / "records.jsonl")
    found = fit(path, tmp_path / "law")
    assert found["verdict"] == "no law" and {each["verdict"] for each in found["students"]} == {"saturating"}
    assert found["paper_reading"]["laws"] == {} and found["paper_reading"]["chosen"] is None
    assert "no law identified: 4 of 4 students gain from larger teachers" in capsys.readouterr().out


def test_totals_are_a_choice(records: str, tmp_path: Path) -> None:
    found = fit(records, tmp_path / "law", "--count", "total")
    assert found["students"][0]["student_params"] == 1.3e6
    assert found["students"][0]["best_ratio"] == pytest.approx(2.5, rel=0.1)


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
    for name in ("curse", "optimum", "law", "compute"):
        picture = imread(tmp_path / "law" / f"{name}.png")
        assert picture.shape[0] >= 800 and picture.shape[1] >= 1200
        assert len(np.unique(picture[::3, ::3, :3].reshape(-1, 3), axis=0)) > 50
    assert plot.pareto([(3, 2.0), (1, 3.0), (2, 3.5), (4, 2.0), (5, 1.0)]) == [(1, 3.0), (3, 2.0), (5, 1.0)]


def test_the_page_is_one_file(records: str, tmp_path: Path) -> None:
    """Every picture is in it and nothing is fetched."""
    fit(records, tmp_path / "law", "--student-params", "3B")
    text = (tmp_path / "law" / "report.html").read_text()
    assert re.findall(r'src="([^,]{0,40})', text) == ["data:image/png;base64"] * 3
    assert not re.findall(r"https?://|@import|<script|<link", text)
    assert "<strong>No recommendation:</strong> nothing here can tell" in text and text.count("<table>") == 3
    for name in ("curse", "optimum", "compute"):
        assert base64.b64encode((tmp_path / "law" / f"{name}.png").read_bytes()).decode() in text


def test_models_are_compared_where_asked_for(records: str, tmp_path: Path) -> None:
    assert fit(records, tmp_path / "one")["models"] == []
    found = fit(records, tmp_path / "two", "--compare")["models"]
    assert [each["model"] for each in found] == ["model of all cells", "rule T = 2.5 S", "rule T = 1.5 S"]
    assert found[0]["error"] > 0 and found[1]["error"] is None
    assert "## Prediction of unseen students" in (tmp_path / "two" / "report.md").read_text()
