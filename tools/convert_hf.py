"""Converts models between Hugging Face folders and Megatron's distributed checkpoints.

    python tools/convert_hf.py import --hf DIR --out RUN_DIR
    python tools/convert_hf.py export --checkpoint RUN_DIR --out HF_DIR
    python tools/convert_hf.py verify --hf DIR --checkpoint RUN_DIR

A configuration can then name RUN_DIR as a checkpoint and RUN_DIR/huggingface as a tokenizer. Import followed by export
reproduces every tensor bit for bit. Under `torchrun --nproc-per-node N` each rank converts its own share of the bytes;
no rank holds a whole model.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_capgap.conversion.importing import Progress
    from megatron_capgap.devices import Device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone, without installation

from megatron_capgap.distributed import process_group
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.runtime import third_party
from tools.command import run_tool_on_ranks

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
PLAIN_SECONDS = 10.0  # interval between progress lines without a terminal


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if verify finds a difference; 2, with one line on stderr, on a user error; 130 after
    Ctrl-C."""
    args = parse_arguments(argv)
    work = partial(run, args)
    return run_tool_on_ranks("convert_hf", work, interrupted="interrupted, nothing was written")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|verify")
    coming = commands.add_parser("import", help="convert a Hugging Face folder to a run directory")
    coming.add_argument(
        "--hf", required=True, metavar="DIR", help="Hugging Face folder: config.json, tokenizer, safetensors"
    )
    coming.add_argument("--out", required=True, metavar="RUN_DIR", help="run directory to create")
    going = commands.add_parser("export", help="convert a checkpoint to a Hugging Face folder")
    going.add_argument(
        "--checkpoint", required=True, metavar="RUN_DIR", help="run directory, or RUN_DIR/checkpoints/step_N"
    )
    going.add_argument("--out", required=True, metavar="HF_DIR", help="folder to create")
    going.add_argument(
        "--max-shard-size",
        type=bytes_of,
        default=bytes_of("5GB"),
        metavar="SIZE",
        help="largest file, for example 500MB (default: 5GB)",
    )
    for command in (coming, going):
        command.add_argument("--dtype", choices=DTYPES, help="data type of the weights (default: unchanged)")
        command.add_argument("--force", action="store_true", help="replace the output of an earlier call")
    comparing = commands.add_parser(
        "verify", help="compare the logits of transformers and Megatron, in fp32 on the CPU"
    )
    comparing.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder, loaded by transformers")
    comparing.add_argument("--checkpoint", required=True, metavar="RUN_DIR", help="checkpoint, loaded by Megatron")
    comparing.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens in each of two sequences (default: 64, or the model's maximum if less)",
    )
    comparing.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random tokens (default: 0)")
    comparing.add_argument("--tensor", type=positive, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    comparing.add_argument(
        "--pipeline", type=positive, default=1, metavar="N", help="pipeline-parallel size (default: 1)"
    )
    comparing.add_argument(
        "--tolerance",
        type=float,
        default=5e-5,
        metavar="X",
        help="largest allowed difference, relative to the largest logit (default: 5e-5)",
    )
    return parser.parse_args(argv)


def positive(value: str) -> int:
    if not value.isdecimal() or not int(value):
        raise argparse.ArgumentTypeError(f"{value} is not an integer > 0")
    return int(value)


def bytes_of(value: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", value.strip().upper())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{value} is not a size such as 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])


def run(args: argparse.Namespace, environment: Environment) -> int:
    third_party.prepare()
    import torch

    from megatron_capgap.devices import choose

    device = choose("cpu", environment.local_rank)
    process_group.init_process_group(environment, device, timeout_seconds=3600)
    if args.command == "verify":
        return verify(args, device, environment.rank == 0)
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    began = time.monotonic()
    with progress_bar(args.command, environment.rank == 0) as progress:
        if args.command == "import":
            from megatron_capgap.conversion.importing import import_folder

            hf, out = Path(args.hf), Path(os.path.abspath(args.out))
            source = import_folder(hf, out, device, dtype=dtype, force=args.force, progress=progress)
            for remark in source.remarks if environment.rank == 0 else ():
                print(f"warning: {remark}")
            if source.skipped and environment.rank == 0:
                print(f"skipped {len(source.skipped)} buffers that are not weights, for example {source.skipped[0]}")
        else:
            from megatron_capgap.conversion.exporting import export_checkpoint

            caution = export_checkpoint(
                os.path.abspath(args.checkpoint),
                Path(os.path.abspath(args.out)),
                device,
                dtype=dtype,
                max_shard_bytes=args.max_shard_size,
                force=args.force,
                progress=progress,
            )
            if caution and environment.rank == 0:
                print(caution)
    if environment.rank == 0:
        written = sum(file.stat().st_size for file in Path(args.out).rglob("*") if file.is_file())
        seconds = time.monotonic() - began
        print(f"wrote {args.out}: {written / 1e6:.1f} MB in {seconds:.1f} s, {written / seconds / 1e6:.1f} MB/s")
    return 0


def verify(args: argparse.Namespace, device: Device, verbose: bool) -> int:
    from megatron_capgap.config.schema import Layout
    from megatron_capgap.conversion.verify import compare

    layout = Layout(tensor=args.tensor, pipeline=args.pipeline)
    found = compare(Path(args.hf), args.checkpoint, layout, device, tokens=args.tokens, seed=args.seed)
    if verbose:
        print(found.text(args.tolerance))
    return 0 if found.agrees(args.tolerance) else 1


@contextmanager
def progress_bar(name: str, verbose: bool) -> Iterator[Progress]:
    """A function of (bytes done, bytes in total): updates a bar on a terminal, otherwise prints a line at intervals."""
    if not verbose or not sys.stderr.isatty():
        yield plain_progress(verbose)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def plain_progress(verbose: bool) -> Progress:
    began = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if verbose and now - last >= PLAIN_SECONDS:
            last = now
            speed = done / (now - began) / 1e6
            print(f"convert_hf: {done / total:.0%} of {total / 1e6:.1f} MB, {speed:.1f} MB/s", file=sys.stderr)

    return show


if __name__ == "__main__":
    sys.exit(main())
