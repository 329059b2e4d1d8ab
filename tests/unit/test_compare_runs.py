"""tools/compare_runs.py: the tables, the page and the picture of runs that are written by hand."""

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import compare_runs


def make_run(folder: Path, losses: list[float], config: dict[str, Any], evaluate_every: int = 2) -> Path:
    """A run directory of steps of 100 tokens, whose second batch was skipped, with a torn last line."""
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(yaml.safe_dump({"run_dir": str(folder), **config}))
    lines: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, 1):
        if step == 2:
            lines.append({"step": step, "bad_batch": "loss nan is not finite", "samples": [3], "skipped": 1})
            continue
        speed = {"tokens_per_second": 10.0 * step, "peak_memory_bytes": step * 2**30}
        lines.append({"step": step, "loss": loss, "cross_entropy": loss, "tokens": 100, **speed})
        if step % evaluate_every == 0:
            lines.append({"step": step, "valid_loss": loss + 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    one = make_run(tmp_path / "a" / "run", [4.0, 0.0, 3.0, 2.0, 2.5, 2.25], {"train": {"steps": 6}, "teacher": None})
    teacher = {"checkpoint": "runs/a|b_c", "ahead": 1}
    other = make_run(tmp_path / "b" / "run", [5.0, 0.0, 4.5, 4.0], {"train": {"steps": 8}, "teacher": teacher})
    return [one, other]


def test_runs_are_compared(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_runs.main([*map(str, two), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line) for line in shown.splitlines()]
    assert ["a/run", "6 of 6", "500", "2.2500", "2.0000", "2.7500", "2.5000", "4", "45", "6.00"] in rows
    assert ["b/run", "4 of 8", "300", "4.0000", "4.0000", "4.5000", "4.5000", "4", "35", "4.00"] in rows
    assert ["train.steps", "6", "8"] in rows
    assert ["teacher.checkpoint", "-", "runs/a|b_c"] in rows and not any(row[0] == "teacher" for row in rows)
    assert "run_dir" not in shown
    page = (tmp_path / "out" / "compare.html").read_text()
    picture = (tmp_path / "out" / "compare.png").read_bytes()
    assert base64.b64encode(picture).decode() in page and "<script" not in page and 'src="http' not in page
    assert "<td>runs/a&#124;b&#95;c</td>" in page or "<td>runs/a|b_c</td>" in page
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1500 and height > 1000  # three panels in two rows


def test_metrics_are_over_the_tokens_that_were_trained_on(two: list[Path]) -> None:
    run = compare_runs.read_run(two[0], "a")
    assert run.points("loss") == [(100, 4.0), (200, 3.0), (300, 2.0), (400, 2.5), (500, 2.25)]
    assert run.points("valid_loss") == [(300, 2.5), (500, 2.75)]
    assert run.points("skipped") == [(100, 1.0)]


def test_the_smoothed_line_does_not_lag() -> None:
    rising = [float(n) for n in range(1000)]
    assert compare_runs.smoothed(rising) == pytest.approx(rising)
    noisy = compare_runs.smoothed([n % 2 for n in range(1000)])
    assert noisy[0] == 0 and all(abs(value - 0.5) < 0.02 for value in noisy[30:-30])


@pytest.mark.parametrize(
    "words, says",
    [
        (["{0}", "{0}"], "RUN: {0} is given twice; name each run once"),
        (["{0}/.."], "/..: no metrics.jsonl; expected the run directory of adapt, distill or finetune"),
        (["{0}", "--metrics", "loss,valid_los"], "--metrics: no run has valid_los; did you mean valid_loss? valid"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert compare_runs.main([*(word.format(two[0]) for word in words), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare_runs: error: ") and says.format(two[0]) in line
    assert not (tmp_path / "out").exists()
