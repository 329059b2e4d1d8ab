"""benchmarks/gpu.py: a rehearsal on the CPU with small sizes, and what it does when something goes wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu
from tests.support.processes import ROOT, environment

measure, marks = gpu.measure, gpu.marks


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    report = measure.Report(tmp_path / "results.jsonl", {"device": "cpu", "tiny": True})
    return measure.Bench("cpu", True, report, tmp_path, time.monotonic() + 60)


def rows(folder: Path) -> list[dict[str, Any]]:
    return measure.read(folder / "results.jsonl", device="cpu", tiny=True)


def rehearse(out: Path, *words: str) -> str:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(out), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    printed = rehearse(tmp_path)
    found = rows(tmp_path)
    assert not [row for row in found if "error" in row]
    for part in gpu.PARTS:
        assert [row for row in found if row["part"] == part and row["name"] == "seconds"], part
    errors = [row["relative_error"] for row in found if row["part"] == "gradients"]
    assert len(errors) >= 6 and max(errors) < 2e-2
    for name in ("ours", "Hugging Face, fp32 weights", "ours, cross-entropy alone"):
        whole = next(row for row in found if row["case"] == "tiny, extrapolated" and row["name"] == name)
        assert whole["ms"] == whole["ms"]
    assert (tmp_path / "trace_ours.json.gz").stat().st_size > 0
    for name in ("bare matrix products", "MFU", "cross-entropy step", "gaps between kernels"):
        assert name in (tmp_path / "marks.md").read_text() and name in printed
    assert "| pass |" not in printed and "| fail |" not in printed


def test_a_part_has_a_process_of_its_own_and_a_later_call_adds_to_the_results(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"device": "cpu", "tiny": true, "part": "x", "case": "", "name": "y"}\n{"')
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write("\n")
    rehearse(tmp_path, "--parts", "ceilings", "--processes")
    assert {"y", "gemm", "copy", "versions"} <= {row["name"] for row in rows(tmp_path)}


def test_a_contender_that_fails_is_a_line_and_the_others_go_on(bench: Any, tmp_path: Path) -> None:
    calls = []

    def late() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("the third call\nand more")

    def absent() -> None:
        raise ImportError("no such library")

    medians = bench.in_turn("loss", "a", {"late": late, "absent": absent, "good": lambda: None})
    assert list(medians) == ["good"]
    found = {row["name"]: row for row in rows(tmp_path)}
    assert found["late"]["error"] == "RuntimeError: the third call"
    assert found["absent"]["absent"] == "not installed: no such library"
    assert found["good"]["repeats"] == measure.TINY_REPEATS


def test_out_of_time_is_a_line(bench: Any, tmp_path: Path) -> None:
    late = measure.Bench("cpu", True, bench.report, tmp_path, ends=0.0)
    assert late.in_turn("loss", "a", {"one": lambda: None}) == {}
    assert rows(tmp_path)[0]["error"] == "not run: out of time"


def test_a_part_that_loses_the_gpu_runs_again_without_that_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    options = gpu._options(["--out", str(tmp_path)])

    def worker(words: list[str], **_: Any) -> Any:
        commands.append(words)
        if len(commands) == 1:
            gpu._report(options).add("loss", "", "lost", error="lost", contender="bad")
        return SimpleNamespace(wait=lambda limit: gpu.LOST if len(commands) == 1 else 0)

    monkeypatch.setattr(gpu.subprocess, "Popen", worker)
    assert gpu._run_in_worker(options, "loss", 60.0)
    assert "--skip" not in commands[0] and commands[1][-2:] == ["--skip", "bad"]


def test_a_part_that_hangs_is_killed_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = gpu._options(["--out", str(tmp_path)])
    start = subprocess.Popen
    monkeypatch.setattr(
        gpu.subprocess, "Popen", lambda words, **more: start([sys.executable, "-c", "input()"], stdin=-1, **more)
    )
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    assert not gpu._run_in_worker(options, "loss", 0.1)
    assert "did not end" in json.loads((tmp_path / "results.jsonl").read_text())["error"]


LOSS: list[dict[str, Any]] = [
    {"name": "matrix products, 2048", "kind": "bare", "chunk": 2048, "ms": 55.0},
    {"name": "ours, triton, 2048", "kind": "ours", "chunk": 2048, "kernels": "triton", "ms": 60.0, "peak_bytes": 3},
    {"name": "ours, eager, 512", "kind": "ours", "chunk": 512, "kernels": "eager", "ms": 136.0, "peak_bytes": 4},
    {"name": "peer", "kind": "peer", "exact": True, "ms": 90.0, "peak_bytes": 2},
    {"name": "inexact", "kind": "peer", "exact": False, "ms": 1.0, "peak_bytes": 1},
]


def test_marks_of_the_loss() -> None:
    of_loss = [{"part": "loss", "case": "TP1", "flops": 43e12, **row} for row in LOSS]
    ceiling = {"part": "ceilings", "case": "", "name": "gemm", "ms": 1.4, "flops_per_second": 790e12}
    found = marks.judge([*of_loss, ceiling])[:6]
    assert [(mark.verdict, mark.found.split(" ")[0]) for mark in found] == [
        ("pass", "0.917"),  # of the matrix products
        ("pass", "0.907"),  # of the large product's rate
        ("pass", "0.667"),  # of the best exact peer's time
        ("fail", "1.5"),  # of its memory
        ("not run", "nothing"),  # no gradient was checked
        ("pass", "2.27"),  # times as fast as eager
    ]


def test_without_numbers_every_mark_is_not_run() -> None:
    assert {mark.verdict for mark in marks.judge([])} == {"not run"}
