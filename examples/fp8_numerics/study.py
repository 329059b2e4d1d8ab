"""The same distillation in several precisions: runs what is missing, then a table and a picture.

python study.py --config study.yaml --runs runs/fp8 --out results
python study.py --config study.yaml --runs runs/fp8_h100 --out results/h100 --device cuda --without mxfp8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BF16 = "{compute: bf16, engine: transformer_engine}"


@dataclass(frozen=True)
class Arithmetic:
    """One run of the study."""

    words: str
    """What the table calls it."""
    student: str = BF16
    """`precision` of the configuration."""
    teacher: str = BF16
    """`teacher.precision`."""


def fp8(recipe: str) -> str:
    """bf16 with the layers' matrix products in FP8."""
    return f"{{compute: bf16, fp8: {{recipe: {recipe}}}}}"


STUDY = {
    "fp32": Arithmetic(
        "fp32", "{compute: fp32, engine: transformer_engine}", "{compute: fp32, engine: transformer_engine}"
    ),
    "bf16": Arithmetic("bf16"),
    "teacher": Arithmetic("bf16, teacher in FP8 tensorwise", teacher=fp8("tensorwise")),
    "delayed": Arithmetic("FP8 delayed", fp8("delayed")),
    "tensorwise": Arithmetic("FP8 tensorwise", fp8("tensorwise")),
    "blockwise": Arithmetic("FP8 blockwise", fp8("blockwise")),
    "mxfp8": Arithmetic("MXFP8", fp8("mxfp8")),
    "both": Arithmetic("FP8 tensorwise, teacher too", fp8("tensorwise"), fp8("tensorwise")),
}
"""Where the teacher is not named it computes in bf16."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--without", nargs="*", choices=STUDY, default=[], help="what the GPU has no kernels for")
    args = parser.parse_args()
    names = [name for name in STUDY if name not in args.without]
    for name in names:
        print(f"== {STUDY[name].words}", flush=True)
        run(args.config, args.runs / name, STUDY[name], args.device)
    found = {name: read(args.runs / name) for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "losses.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    (args.out / "table.md").write_text(text)
    draw(found, args.out / "curves.png")
    print(text)


def run(config: Path, run_dir: Path, arithmetic: Arithmetic, device: str) -> None:
    """One distillation; does nothing where it is finished."""
    words = ["distill", "--config", str(config), f"--run_dir={run_dir}", f"--device={device}"]
    words += [f"--precision={arithmetic.student}", f"--teacher.precision={arithmetic.teacher}"]
    done = subprocess.run([sys.executable, "-m", "megatron_capgap", *words])
    if done.returncode:
        sys.exit(done.returncode)


def read(run_dir: Path) -> dict[str, list[float]]:
    """Training losses of every step, and the held-out losses."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [line["loss"] for line in lines if "loss" in line],
        "valid_loss": [line["valid_loss"] for line in lines if "valid_loss" in line],
    }


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Each arithmetic beside fp32: how far its training losses part from it, and where it ends."""
    rows = [
        "| arithmetic | held-out loss | minus fp32's | mean difference of a step's loss | largest |",
        "|---|---|---|---|---|",
    ]
    exact = found["fp32"]
    for name, losses in found.items():
        apart = [abs(one - other) for one, other in zip(losses["loss"], exact["loss"], strict=True)]
        last = losses["valid_loss"][-1]
        numbers = (
            f"{last:.4f} | {last - exact['valid_loss'][-1]:+.4f} | {sum(apart) / len(apart):.4f} | {max(apart):.4f}"
        )
        rows.append(f"| {STUDY[name].words} | {numbers} |")
    return "\n".join(rows) + "\n"


def draw(found: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Training losses on the left, their differences from fp32's on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = ["-", "--", "-.", ":"]
    colours = matplotlib.colormaps["viridis"]
    for number, (name, losses) in enumerate(found.items()):
        look = {"color": colours(number / len(found)), "linestyle": styles[number % len(styles)], "linewidth": 1.3}
        steps = range(1, len(losses["loss"]) + 1)
        left.plot(steps, losses["loss"], label=STUDY[name].words, **look)
        apart = [one - other for one, other in zip(losses["loss"], found["fp32"]["loss"], strict=True)]
        right.plot(steps, apart, **look)
    left.set(xlabel="step", ylabel="training loss, nats a token")
    right.set(xlabel="step", ylabel="difference from fp32, nats a token")
    left.legend(fontsize=8)
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main()
