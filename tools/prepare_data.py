"""Converts text to Megatron indexed datasets; optionally trains a tokenizer first.

    python tools/prepare_data.py --input a.jsonl web/*.parquet books/ --out data/corpus --split 0.99,0.01 \\
        --tokenizer data/tokenizer.model --train-tokenizer 32000

writes data/tokenizer.model, data/corpus_train.{bin,idx} and data/corpus_valid.{bin,idx}. Files get their final names
only after they are complete and verified.
"""

import argparse
import itertools
import os
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from megatron_capgap.data.corpus import Encoded, Malformed, Source
    from megatron_capgap.data.tokenizer import Tokenizer
    from megatron_capgap.data.writer import DatasetWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone, without installation

from megatron_capgap.common.errors import UserError
from megatron_capgap.runtime import third_party
from tools.command import run_tool

SPLITS = ("train", "valid", "test")
PLAIN_SECONDS = 10.0  # interval between progress lines without a terminal


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2, with one line on stderr, on a user error; 130 after Ctrl-C."""
    args = parse_arguments(argv)
    third_party.prepare()

    def work() -> int:
        targets = check_paths(args)
        print(prepare(args, targets).text())
        return 0

    return run_tool("prepare_data", work, place=args.out, interrupted="interrupted, nothing was written")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, in order: jsonl, JSON, parquet, Arrow or plain text, each also .gz, .bz2, .xz or .zst; folders, "
        "patterns, and hf:REPOSITORY[:CONFIGURATION][:SPLIT] of the Hugging Face Hub",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="SentencePiece model or Hugging Face tokenizer folder",
    )
    parser.add_argument("--out", required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument(
        "--documents",
        choices=("file", "line", "blank-line"),
        help="the input is plain text, and a document is a whole file, a line, or what is between blank lines "
        "(default: text is JSON; .txt files that are not JSON are one document each)",
    )
    parser.add_argument(
        "--split",
        type=shares,
        metavar="A,B[,C]",
        help="fractions of the documents for PREFIX_train, _valid and _test; assigned by line number",
    )
    parser.add_argument(
        "--train-tokenizer",
        type=positive,
        metavar="VOCAB",
        help="first train a SentencePiece BPE model with byte fallback on the input, saved as --tokenizer",
    )
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="start documents with the tokenizer's bos (default: if the tokenizer puts it before a text)",
    )
    parser.add_argument("--no-eos", action="store_true", help="do not end documents with the tokenizer's eos")
    parser.add_argument(
        "--max-tokens",
        type=amount,
        metavar="N",
        help="stop after the document that reaches N tokens, for example 500M or 2B",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed line")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "--workers",
        type=positive,
        default=cores(),
        metavar="N",
        help="tokenizer processes (default: all cores); the output does not depend on it",
    )
    return parser.parse_args(argv)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not > 0")
    return number


def amount(value: str) -> int:
    """A whole number, possibly with K, M, B or T for thousands, millions, ..."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", value.strip().upper())
    number = round(float(found[1]) * 1000 ** " KMBT".index(found[2] or " ")) if found else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of tokens, for example 500M or 2B")
    return number


def shares(value: str) -> list[float]:
    parts = [float(part) for part in value.split(",")]
    if not 2 <= len(parts) <= len(SPLITS) or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{value}: expected two or three fractions with sum 1, for example 0.99,0.01")
    return parts


def check_paths(args: argparse.Namespace) -> list[str]:
    """Validates all paths before the work starts, and replaces folders and patterns in `args.input` by their files;
    returns the prefixes to write."""
    from megatron_capgap.data.inputs import expand

    args.input = expand(args.input)
    if args.out.endswith((".bin", ".idx", "/")):
        raise UserError(f"--out {args.out}: pass a prefix without extension, for example data/corpus")
    targets = [f"{args.out}_{name}" for name in SPLITS[: len(args.split)]] if args.split else [args.out]
    made = [f"{target}{ending}" for target in targets for ending in (".bin", ".idx")]
    if args.train_tokenizer:
        made.append(args.tokenizer)
    for file in made:
        if Path(file).is_dir():
            raise UserError(f"{file} is a folder: choose another name")
        if Path(file).exists() and not args.force:
            raise UserError(f"{file} exists already: choose another name, or replace it with --force")
        folder = next(parent for parent in Path(file).absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{file} cannot be created in {folder}: choose a writable folder")
    return targets


def prepare(args: argparse.Namespace, targets: list[str]) -> "Report":
    """Trains the tokenizer, tokenizes, verifies, then publishes the files; returns what was read."""
    from megatron_capgap.data.corpus import Source, train_vocabulary
    from megatron_capgap.data.jsonl import check_files
    from megatron_capgap.data.tokenizer import open_tokenizer
    from megatron_capgap.data.writer import DatasetWriter

    source = Source(args.input, args.text_key, args.documents)
    check_files(*source)
    trained = Path(f"{args.tokenizer}.partial") if args.train_tokenizer else None
    writers: list[DatasetWriter] = []
    try:
        if trained:
            say(f"training a vocabulary of {args.train_tokenizer} on {len(args.input)} file(s)")
            trained.parent.mkdir(parents=True, exist_ok=True)
            trained.write_bytes(train_vocabulary(source, args.train_tokenizer))
        path = str(trained or args.tokenizer)
        tokenizer = open_tokenizer(path)
        for remark in tokenizer.remarks:
            say(f"warning: {remark}")
        bos = begins(args, path, tokenizer)
        for target in targets:
            writers.append(DatasetWriter(target, tokenizer.vocab_size))
        found = tokenize(args, source, path, bos, writers)
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.publish()
        if trained:
            trained.replace(args.tokenizer)
    finally:
        for writer in writers:
            writer.discard()
        if trained:
            trained.unlink(missing_ok=True)
    found.wrote = [args.tokenizer] if args.train_tokenizer else []
    return found


def begins(args: argparse.Namespace, path: str, tokenizer: "Tokenizer") -> bool:
    """Whether documents begin with bos.

    Raises:
        UserError: the tokenizer has no bos or eos that the arguments ask for.
    """
    if tokenizer.eos is None and not args.no_eos:
        raise UserError(f"tokenizer {path} has no eos to end documents: use a tokenizer with eos, or --no-eos")
    if tokenizer.bos is None and args.bos:
        raise UserError(f"tokenizer {path} has no bos to start documents: use a tokenizer with bos, or remove --bos")
    if args.bos is not None:
        return args.bos
    bos = tokenizer.bos is not None and tokenizer.bos in tokenizer.before
    if bos:
        say(f"documents begin with bos ({tokenizer.bos}), as the tokenizer puts it before a text; see --no-bos")
    return bos


def tokenize(
    args: argparse.Namespace, source: "Source", tokenizer_path: str, bos: bool, writers: list["DatasetWriter"]
) -> "Report":
    """Fills the writers and reports malformed lines.

    Raises:
        UserError: a malformed line, with --strict; or no valid line.
    """
    from megatron_capgap.data.corpus import Malformed, encode_files, uniform
    from megatron_capgap.data.inputs import size_of

    bounds = list(itertools.accumulate(args.split or [1.0]))[:-1]
    malformed, found, limit = Malformed(), Report(writers), args.max_tokens or sys.maxsize
    total = sum(map(size_of, args.input))
    workers = min(args.workers, 1 + (total >> 20)) if total else args.workers  # at least a megabyte per process
    blocks = encode_files(source, tokenizer_path, bos, not args.no_eos, workers)
    with closing(blocks), progress_bar(total) as progress:
        for encoded in blocks:
            for kind, where in encoded.problems:
                if args.strict:
                    raise UserError(f"{where} ({kind}): fix the line, or remove --strict to skip such lines")
                malformed.add(kind, where)
            for number, ids, size, digest in documents(encoded):
                writers[sum(uniform(number) >= bound for bound in bounds)].add(ids, size)
                found.add(len(ids), digest)
                if found.tokens >= limit:
                    break
            progress(encoded.consumed)
            if found.tokens >= limit:
                break
    if not found.hashes:
        raise malformed.nothing_read(source)
    if found.tokens < (args.max_tokens or 0):
        say(f"warning: the input has {found.tokens} tokens, fewer than --max-tokens {args.max_tokens}")
    report(malformed)
    return found.finish()


class Report:
    """What was read.

    Attributes:
        tokens: of all documents.
        longest: tokens of the longest document.
        hashes: a hash of each document's text.
        wrote: files that were written beside the datasets.
    """

    def __init__(self, writers: list["DatasetWriter"]) -> None:
        self.tokens = self.longest = 0
        self.hashes, self.wrote = array("Q"), []
        self._writers, self._began, self._seconds = writers, time.monotonic(), 0.0

    def add(self, tokens: int, digest: int) -> None:
        """Adds a document."""
        self.tokens += tokens
        self.longest = max(self.longest, tokens)
        self.hashes.append(digest)

    def finish(self) -> "Report":
        """Stops the clock."""
        self._seconds = time.monotonic() - self._began
        return self

    def text(self) -> str:
        """The report, of several lines."""
        import numpy as np

        counts: Counter[str] = sum((writer.counts for writer in self._writers), Counter())
        copies = len(self.hashes) - len(np.unique(np.frombuffer(self.hashes, dtype=np.uint64)))
        lines = [
            f"{counts['documents']} documents, {counts['tokens']} tokens, {counts['bytes']} bytes of text, "
            f"{counts['tokens'] / counts['bytes']:.4f} tokens per byte, {self._seconds:.1f} s, "
            f"{counts['bytes'] / self._seconds / 1e6:.2f} MB/s",
            f"longest document: {self.longest} tokens; copies of an earlier document: {copies} "
            f"({copies / len(self.hashes):.1%})",
        ]
        lines += [f"wrote {file}" for file in self.wrote]
        for writer in self._writers:
            lines.append(
                f"wrote {writer.prefix}.bin and .idx: {writer.counts['documents']} documents, "
                f"{writer.counts['tokens']} tokens"
            )
        return "\n".join(lines)


def documents(encoded: "Encoded") -> Iterator[tuple[int, "np.ndarray", int, int]]:
    """Line number, token ids, text bytes and hash of each document."""
    start = 0
    columns = (encoded.numbers, encoded.lengths, encoded.text_bytes, encoded.hashes)
    for number, length, size, digest in zip(*columns, strict=True):
        yield number, encoded.ids[start : start + length], size, digest
        start += length


class Progress(Protocol):
    def __call__(self, consumed: int) -> None: ...


@contextmanager
def progress_bar(total: int) -> Iterator[Progress]:
    """A function of the bytes read so far: updates a bar on a terminal, otherwise prints a line at intervals."""
    if not sys.stderr.isatty():
        yield plain_progress(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tokenizing", total=total)
        yield lambda consumed: bar.update(task, completed=consumed)


def plain_progress(total: int) -> Progress:
    began = last = time.monotonic()

    def show(consumed: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_SECONDS:
            return
        last = now
        if not consumed:
            say(f"{now - began:.0f} s, reading from the network")
            return
        speed = consumed / (now - began)
        left = (total - consumed) / speed
        say(f"{consumed / total:.0%} of {total / 1e6:.1f} MB, {speed / 1e6:.2f} MB/s, {left:.0f} s left")

    return show


def report(malformed: "Malformed") -> None:
    for kind, count in malformed.counts.items():
        say(f"{count} line(s) skipped: {kind}")
        places = malformed.places[kind]
        for place in places:
            print(f"  {place}", file=sys.stderr)
        if count > len(places):
            print(f"  and {count - len(places)} more", file=sys.stderr)


def say(message: str) -> None:
    print(f"prepare_data: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
