"""What benchmarks/releases.py does without training: installing a release, and telling how far runs are apart."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import releases


def test_a_folder_that_pip_has_not_finished_is_not_taken_for_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(words: list[str], **_: Any) -> None:
        folder = Path(words[words.index("--target") + 1])
        folder.mkdir()
        (folder / "half").touch()
        if broken:
            raise subprocess.CalledProcessError(1, words)
        (folder / "other half").touch()

    monkeypatch.setattr(releases.subprocess, "run", pip)
    broken = True
    with pytest.raises(subprocess.CalledProcessError):
        releases.fetch("0.16.1", tmp_path)
    assert list(tmp_path.iterdir()) == []
    broken = False
    releases.fetch("0.16.1", tmp_path)
    assert {file.name for file in (tmp_path / "megatron_core_0.16.1").iterdir()} == {"half", "other half"}
    broken = True
    releases.fetch("0.16.1", tmp_path)  # is there already


@pytest.mark.parametrize(
    "loss, lines, close", [(2.0, 2, True), (2.00001, 2, True), (2.0001, 2, False), (2.0, 1, False), (2.0, 0, False)]
)
def test_runs_are_compared_line_by_line(tmp_path: Path, loss: float, lines: int, close: bool) -> None:
    """One value in the second line is another, or lines are missing."""
    steps = [{"step": 1, "loss": 3.0, "tokens_per_second": 5.0}, {"step": 2, "loss": 2.0, "tokens_per_second": 5.0}]
    others = [{**steps[0], "tokens_per_second": 7.0}, {**steps[1], "loss": loss}]
    for name, entries in (("one", steps), ("other", others[:lines])):
        (tmp_path / name / "run").mkdir(parents=True)
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / name / "run" / "metrics.jsonl").write_text(text)
    assert releases.compare_runs(tmp_path / "one", tmp_path / "other") == close


def test_nothing_to_compare_is_no_success(tmp_path: Path) -> None:
    assert not releases.compare_runs(tmp_path, tmp_path)
