"""Tasks of lm-evaluation-harness on a few made-up texts."""

import json
from itertools import pairwise
from pathlib import Path

import yaml

from tests.support.corpus import texts


def write(folder: Path) -> dict[str, str]:
    """A multiple-choice task, whose longer contexts must be cut, a perplexity task of several windows a text, and texts
    to continue up to a letter or a number of tokens."""
    words = [text.split() for text in texts(24, seed=11)]
    choices = [
        {
            "context": " ".join(mine[: 3 + 2 * (number % 5)]),
            "choices": [" ".join(x) for x in (mine[3:5], other[1:2], other[2:6], mine[:1])],
            "answer": number % 4,
        }
        for number, (mine, other) in enumerate(pairwise(words))
    ]
    documents = [{"text": " ".join(mine)} for mine in words[:6]]
    common = {"dataset_path": "json", "test_split": "test"}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    generate = {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    }
    files = {}
    for name, rows, task in (
        ("choice", choices, choice),
        ("rolling", documents, rolling),
        ("generate", choices[:8], generate),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        where = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"task": f"local_{name}", **common, **task, "dataset_kwargs": where}))
        files[name] = str(file)
    return files
