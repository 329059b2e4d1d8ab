"""Turn jsonl text into Megatron indexed datasets, and train a tokenizer on it where there is none.

    python tools/prepare_data.py --input a.jsonl b.jsonl.gz --out data/corpus --split 0.99,0.01 \\
        --tokenizer data/tokenizer.model --train-tokenizer 32000

writes data/tokenizer.model, data/corpus_train.{bin,idx} and data/corpus_valid.{bin,idx}. Files appear under
their names only when they are whole and checked.
"""

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from megatron_capgap.data.corpus import Encoded, Malformed
    from megatron_capgap.data.writer import DatasetWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from megatron_capgap.common.errors import UserError
from megatron_capgap.runtime import third_party

SPLITS = ("train", "valid", "test")
PLAIN_SECONDS = 10.0  # between lines of progress where there is no terminal


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 with one line on stderr where the input is at fault; 130 after Ctrl-C."""
    args = parse_arguments(argv)
    third_party.prepare()
    try:
        prepare(args, check_paths(args))
    except UserError as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare_data: error: {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl or .jsonl.gz, in order")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="SentencePiece model or Hugging Face tokenizer folder",
    )
    parser.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in a line (text)")
    parser.add_argument(
        "--split",
        type=shares,
        metavar="A,B[,C]",
        help="share of the documents for PREFIX_train, _valid and _test; the line number alone decides",
    )
    parser.add_argument(
        "--train-tokenizer",
        type=positive,
        metavar="VOCAB",
        help="first train a SentencePiece BPE model with byte fallback on the input, saved as --tokenizer",
    )
    parser.add_argument("--bos", action="store_true", help="begin documents with the tokenizer's bos")
    parser.add_argument("--no-eos", action="store_true", help="do not end documents with the tokenizer's eos")
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed line")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--workers",
        type=positive,
        default=cores(),
        metavar="N",
        help="processes that tokenize (all cores); the output does not depend on it",
    )
    return parser.parse_args(argv)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return number


def shares(value: str) -> list[float]:
    parts = [float(part) for part in value.split(",")]
    if not 2 <= len(parts) <= len(SPLITS) or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{value} is not two or three shares that add up to 1, like 0.99,0.01")
    return parts


def check_paths(args: argparse.Namespace) -> list[str]:
    """Prefixes to write, once everything that can be known before the work is known to be right."""
    for file in args.input:
        if not Path(file).is_file():
            raise UserError(f"--input {file} does not exist or is not a file: give .jsonl or .jsonl.gz files")
    if args.out.endswith((".bin", ".idx", "/")):
        raise UserError(f"--out {args.out}: give a prefix without ending, like data/corpus")
    targets = [f"{args.out}_{name}" for name in SPLITS[: len(args.split)]] if args.split else [args.out]
    made = [f"{target}{ending}" for target in targets for ending in (".bin", ".idx")]
    if args.train_tokenizer:
        made.append(args.tokenizer)
    for file in made:
        if Path(file).is_dir():
            raise UserError(f"{file} is a folder: choose another name")
        if Path(file).exists() and not args.force:
            raise UserError(f"{file} is there already: choose another name, or replace it with --force")
        folder = next(parent for parent in Path(file).absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{file} cannot be made in {folder}: choose a folder that is writable")
    return targets


def prepare(args: argparse.Namespace, targets: list[str]) -> None:
    """Train, tokenize, check, and only then publish."""
    from megatron_capgap.data.corpus import train_vocabulary
    from megatron_capgap.data.jsonl import check_files
    from megatron_capgap.data.tokenizer import open_tokenizer
    from megatron_capgap.data.writer import DatasetWriter

    check_files(args.input)
    trained = Path(f"{args.tokenizer}.partial") if args.train_tokenizer else None
    writers: list[DatasetWriter] = []
    try:
        if trained:
            say(f"training a vocabulary of {args.train_tokenizer} on {len(args.input)} file(s)")
            trained.parent.mkdir(parents=True, exist_ok=True)
            trained.write_bytes(train_vocabulary(args.input, args.text_key, args.train_tokenizer))
        path = str(trained or args.tokenizer)
        tokenizer = open_tokenizer(path)
        for remark in tokenizer.remarks:
            say(f"warning: {remark}")
        if tokenizer.eos is None and not args.no_eos:
            raise UserError(f"tokenizer {path} has no eos to end a document: give one that has, or --no-eos")
        if tokenizer.bos is None and args.bos:
            raise UserError(f"tokenizer {path} has no bos to begin a document: give one that has, or leave out --bos")
        for target in targets:
            writers.append(DatasetWriter(target, tokenizer.vocab_size))
        began = time.monotonic()
        tokenize(args, path, writers)
        seconds = time.monotonic() - began
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
    summarize(args, writers, seconds)


def tokenize(args: argparse.Namespace, tokenizer_path: str, writers: list["DatasetWriter"]) -> None:
    """Fill the writers, and report malformed lines.

    Raises:
        UserError: a malformed line, where --strict is given; or there is no other line.
    """
    from megatron_capgap.data.corpus import Malformed, encode_files, uniform

    bounds = list(itertools.accumulate(args.split or [1.0]))[:-1]
    malformed = Malformed()
    total = sum(Path(file).stat().st_size for file in args.input)
    workers = min(args.workers, 1 + (total >> 20))  # a process is not worth starting for less than a megabyte
    blocks = encode_files(args.input, tokenizer_path, args.text_key, args.bos, not args.no_eos, workers)
    with closing(blocks), progress_bar(total) as progress:
        for encoded in blocks:
            for kind, where in encoded.problems:
                if args.strict:
                    raise UserError(f"{where} ({kind}): mend the line, or leave out --strict to skip such lines")
                malformed.add(kind, where)
            for number, ids, size in documents(encoded):
                writers[sum(uniform(number) >= bound for bound in bounds)].add(ids, size)
            progress(encoded.consumed)
    if not any(writer.counts["documents"] for writer in writers):
        raise malformed.nothing_read(args.input, args.text_key)
    report(malformed)


def documents(encoded: "Encoded") -> Iterator[tuple[int, "np.ndarray", int]]:
    """Line number, ids and bytes of each document."""
    start = 0
    for number, length, size in zip(encoded.numbers, encoded.lengths, encoded.text_bytes, strict=True):
        yield number, encoded.ids[start : start + length], size
        start += length


class Progress(Protocol):
    def __call__(self, consumed: int) -> None: ...


@contextmanager
def progress_bar(total: int) -> Iterator[Progress]:
    """A function that takes the bytes read so far: a bar on a terminal, else a line now and then."""
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
        speed = consumed / (now - began)
        left = (total - consumed) / speed
        say(f"{consumed / total:.0%} of {total / 1e6:.1f} MB, {speed / 1e6:.2f} MB/s, {left:.0f} s left")

    return show


def report(malformed: "Malformed") -> None:
    for kind, count in malformed.counts.items():
        say(f"{count} line(s) left out: {kind}")
        places = malformed.places[kind]
        for place in places:
            print(f"  {place}", file=sys.stderr)
        if count > len(places):
            print(f"  and {count - len(places)} more", file=sys.stderr)


def summarize(args: argparse.Namespace, writers: list["DatasetWriter"], seconds: float) -> None:
    counts: Counter[str] = sum((writer.counts for writer in writers), Counter())
    print(
        f"{counts['documents']} documents, {counts['tokens']} tokens, {counts['bytes']} bytes of text, "
        f"{counts['tokens'] / counts['bytes']:.4f} tokens per byte, {seconds:.1f} s, "
        f"{counts['bytes'] / seconds / 1e6:.2f} MB/s"
    )
    if args.train_tokenizer:
        print(f"wrote {args.tokenizer}")
    for writer in writers:
        print(
            f"wrote {writer.prefix}.bin and .idx: {writer.counts['documents']} documents, "
            f"{writer.counts['tokens']} tokens"
        )


def say(message: str) -> None:
    print(f"prepare_data: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
