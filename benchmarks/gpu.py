"""Measures the loss, a training step and a teacher's layer on one GPU, beside other implementations.

    python benchmarks/gpu.py [--parts loss,step] [--out DIR] [--seconds 540]
    python benchmarks/gpu.py --device cpu --tiny          # a rehearsal: the same code on small sizes

Parts, in this order: ceilings (versions, a large matrix product, a large copy), loss, kernels (the loss's passes, by
the profiler), step (8B to 3B and 3B to 1B at two depths), teacher (a layer in bf16 and FP8), profile (kernels and gaps
of a step). Each runs in a process of its own, for its share of the time; what goes wrong in one is a line of the
report. Results are appended to DIR/results.jsonl as they come, so that a later call with other parts completes the
table of marks, which is printed at the end and written to DIR/marks.md. Random data; 3 warm-up calls, the median of 10
between CUDA events, contenders in turn.

Peers are measured where they are installed: pip install liger-kernel cut-cross-entropy nvidia-modelopt transformers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
from gpu_parts import marks, measure, product  # noqa: E402

PARTS = {"ceilings": 40, "loss": 220, "kernels": 40, "step": 160, "teacher": 50, "profile": 50}
"""Seconds that a part may measure; a measurement that has begun is finished."""
GRACE = 20.0
"""Seconds after which a part that does not end is killed."""
LOST = 3
"""Exit code of a part whose GPU refuses further work."""
TRIES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, prints the marks. Returns 1 if a mark failed or a part gave no result."""
    options = _options(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    if options.worker:
        code = _run_part(options, options.worker, options.ends)
        if code == LOST:  # to destroy a process group would wait for the GPU
            sys.stdout.flush()
            os._exit(code)
        product.close()
        return code
    ends, broken = time.monotonic() + options.seconds, []
    # A CPU has no state that a failed part could break, and imports take longer than parts.
    run = _run_in_worker if options.device == "cuda" or options.processes else _run_here
    for part in options.parts:
        if not run(options, part, min(PARTS[part], ends - time.monotonic() - GRACE)):
            broken.append(part)
    product.close()
    found = marks.judge(measure.read(results, device=options.device, tiny=options.tiny))
    if options.tiny:
        found = [mark if mark.verdict == "not run" else mark._replace(verdict="rehearsal") for mark in found]
    lines: list[str] = []
    marks.table(found, lines.append)
    text = "\n".join(lines)
    (options.out / "marks.md").write_text(f"{text}\n")
    print(f"\nmarks ({results}):\n{text}", flush=True)
    if broken:
        print(f"parts that did not end well: {', '.join(broken)}", flush=True)
    return 1 if broken or any(mark.verdict == "fail" for mark in found) else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_benchmark"), help="folder of results and traces")
    parser.add_argument("--seconds", type=float, default=540.0, help="of all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, few repeats; times mean nothing")
    parser.add_argument("--processes", action="store_true", help="a process for each part on a CPU, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)  # on the monotonic clock, which processes share
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: the sizes are a GPU's; add --tiny")
    return options


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: not one of {', '.join(PARTS)}")
    return [part for part in PARTS if part in parts]


def _run_part(options: argparse.Namespace, part: str, ends: float) -> int:
    """Runs a part in this process until `ends` at most; returns 0, 1 after an error, or `LOST`."""
    report = _report(options)
    bench = measure.Bench(options.device, options.tiny, report, options.out, ends, frozenset(options.skip))
    begun = time.monotonic()
    try:
        importlib.import_module(f"gpu_parts.{part}").run(bench)
    except measure.OutOfTime:
        report.add(part, "", "the rest", error="not run: out of time")
    except measure.DeviceLost as lost:
        report.add(part, "", "lost", error="the GPU refuses further work", contender=str(lost))
        return LOST
    except Exception as error:
        report.add(part, "", "the rest", error=f"{type(error).__name__}: {str(error)[:300]}")
        return 1
    report.add(part, "", "seconds", seconds=time.monotonic() - begun)
    return 0


def _report(options: argparse.Namespace) -> measure.Report:
    return measure.Report(options.out / "results.jsonl", {"device": options.device, "tiny": options.tiny})


def _run_here(options: argparse.Namespace, part: str, seconds: float) -> bool:
    return _run_part(options, part, time.monotonic() + seconds) == 0


def _run_in_worker(options: argparse.Namespace, part: str, seconds: float) -> bool:
    """Runs a part in a process, again without a contender in which the GPU was lost; kills it after its time."""
    skip: list[str] = []
    ends = time.monotonic() + seconds
    for _ in range(TRIES):
        left = ends - time.monotonic()
        if left <= 0:
            _report(options).add(part, "", "the rest", error="not run: out of time")
            return False
        command = [sys.executable, __file__, "--worker", part, "--device", options.device, "--out", str(options.out)]
        command += ["--ends", str(ends), *(["--tiny"] if options.tiny else [])]
        command += [word for name in skip for word in ("--skip", name)]
        worker = subprocess.Popen(command, start_new_session=True)
        try:
            code = worker.wait(left + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            _report(options).add(part, "", "the rest", error="not run: killed, a call did not end")
            return False
        if code == 0:
            return True
        if code != LOST:
            _report(options).add(part, "", "end", error=f"ended with exit code {code}")
            return False
        skip.append(_lost_contender(options, part))
    return False


def _lost_contender(options: argparse.Namespace, part: str) -> str:
    """The contender in which a part lost the GPU."""
    lines = (options.out / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["contender"] for row in rows if row["part"] == part and "contender" in row][-1]


if __name__ == "__main__":
    sys.exit(main())
