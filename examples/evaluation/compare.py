"""The harness's own Hugging Face backend on an exported model, request by request beside what the sharded model said.

python compare.py HF_FOLDER RESULTS.json TASK.yaml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

TOLERANCE = 1e-3


def main() -> int:
    """Prints the largest difference; exit status 1 where a log-likelihood or a choice is another one."""
    folder, results, task = sys.argv[1:4]
    ours = by_document(json.loads(Path(results).read_text()))
    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4)
    theirs = by_document(simple_evaluate(model, tasks=[task]))
    assert ours.keys() == theirs.keys(), "the same documents"
    apart, other = 0.0, 0
    for key, row in theirs.items():
        pairs = list(zip(ours[key]["filtered_resps"], row["filtered_resps"], strict=True))
        apart = max(apart, *(abs(mine[0] - their[0]) for mine, their in pairs))
        other += ours[key]["acc"] != row["acc"] or ours[key]["acc_norm"] != row["acc_norm"]
        other += any(mine[1] != their[1] for mine, their in pairs)
    count = sum(len(row["filtered_resps"]) for row in theirs.values())
    print(f"{count} requests: log-likelihoods differ by {apart:.1e} at most; {other} documents with another choice")
    return int(apart > TOLERANCE or other > 0)


def by_document(results: dict) -> dict:
    return {(task, row["doc_id"]): row for task, rows in results["samples"].items() for row in rows}


if __name__ == "__main__":
    sys.exit(main())
