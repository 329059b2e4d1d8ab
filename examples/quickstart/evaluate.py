"""Evaluates several runs one after the other in one process, which imports its libraries once.

    python ../evaluate.py NAME...

is, for each name that was not evaluated after its last checkpoint,

    python -m megatron_capgap evaluate --config ../evaluate.yaml \\
        --student.checkpoint=runs/NAME --run_dir=runs/evaluate_NAME
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_capgap.cli import main


def evaluate(names: list[str]) -> int:
    """Returns the first exit code that is not 0."""
    for name in names:
        found = Path(f"runs/evaluate_{name}/evaluation.json")
        if found.is_file() and found.stat().st_mtime > Path(f"runs/{name}/checkpoints").stat().st_mtime:
            continue
        source = [f"--student.checkpoint=runs/{name}", f"--run_dir=runs/evaluate_{name}"]
        if code := main(["evaluate", "--config", "../evaluate.yaml", *source]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:]))
