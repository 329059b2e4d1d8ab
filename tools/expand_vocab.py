"""Adds the pieces of a second SentencePiece model to a vocabulary, and the rows for them to a checkpoint.

    python tools/expand_vocab.py --tokenizer FIRST.model --add SECOND.model --out DIR \\
        [--text FILE ...] [--checkpoint RUN_DIR]

writes DIR/tokenizer.model, in which old ids are unchanged and new pieces follow them. With --checkpoint, DIR also
becomes a run directory: embedding and LM head get one row per new piece, the mean of the rows of the old pieces that it
splits into. Continue with `adapt`, student.checkpoint: DIR and data.tokenizer: DIR/tokenizer.model. Under `torchrun
--nproc-per-node N` each rank copies its own share of the bytes; no rank holds a whole model. With --text it prints
tokens per character before and after.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_capgap.checkpoint.metadata import CheckpointMetadata
    from megatron_capgap.data.vocab_merge import Count, Expansion

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone, without installation

from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed import collectives, process_group
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.runtime import third_party
from tools.command import run_tool_on_ranks

TOKENIZER = "tokenizer.model"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2, with one line on stderr, on a user error; 130 after Ctrl-C. In both cases nothing is
    written."""
    args = parse_arguments(argv)
    work = partial(run, args)
    return run_tool_on_ranks("expand_vocab", work, interrupted="interrupted, nothing was written")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="expand_vocab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="SentencePiece model to expand, or a folder with tokenizer.model",
    )
    parser.add_argument(
        "--add", required=True, metavar="PATH", help="SentencePiece model with the pieces to add, of the same type"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts in which to count tokens: .jsonl with a text field, or plain lines",
    )
    parser.add_argument(
        "--checkpoint", metavar="RUN_DIR", help="run directory, or RUN_DIR/checkpoints/step_N; trained with --tokenizer"
    )
    parser.add_argument("--force", action="store_true", help="replace the output of an earlier call")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, environment: Environment) -> int:
    third_party.prepare()
    from megatron_capgap.checkpoint import run_directory
    from megatron_capgap.data import vocab_merge
    from megatron_capgap.devices import choose

    process_group.init_process_group(environment, choose("cpu", environment.local_rank), timeout_seconds=3600)
    from megatron_capgap.conversion.output_folder import refuse_existing, refuse_to_lose, replacing

    out = Path(args.out)
    refuse_existing(out, made_here, args.force)
    first, second = (vocab_merge.model_file(path) for path in (args.tokenizer, args.add))
    checkpoint = run_directory.locate(args.checkpoint) if args.checkpoint else None
    if checkpoint:
        refuse_other_tokenizer(checkpoint, first)
    for source in (first, second, checkpoint):
        if source:
            refuse_to_lose(source, out)
    expansion = vocab_merge.expand(first, second)
    with replacing(out, made_here, force=args.force) as staged:
        fingerprint, counts = collectives.run_on_rank0(lambda: write_tokenizer(staged, first, expansion, args.text))
        grown = grow(checkpoint, staged, out, expansion, fingerprint) if checkpoint else None
    if environment.rank == 0:
        report(args, expansion, counts, grown)
    return 0


def made_here(folder: Path) -> bool:
    """Whether a folder is the output of an earlier call, without training results."""
    return (folder / TOKENIZER).is_file() and {file.name for file in folder.iterdir()} <= {
        TOKENIZER,
        "checkpoints",
        "latest",
    }


def refuse_other_tokenizer(checkpoint: Path, first: Path) -> None:
    """Raises a UserError if a checkpoint has a different vocabulary."""
    from megatron_capgap.checkpoint import metadata
    from megatron_capgap.data.tokenizer import open_tokenizer

    meta, tokenizer = metadata.read(checkpoint), open_tokenizer(str(first))
    if meta.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{checkpoint} was trained with tokenizer {meta.tokenizer} ({meta.tokenizer_fingerprint[:12]}), "
            f"--tokenizer is {first} ({tokenizer.fingerprint[:12]}); use the checkpoint's tokenizer"
        )
    if tokenizer.vocab_size > meta.model.vocab:
        raise UserError(
            f"{checkpoint}: has {meta.model.vocab} rows for the {tokenizer.vocab_size} tokens of {first}; use a "
            "checkpoint with a row for each token"
        )


def write_tokenizer(staged: Path, first: Path, expansion: Expansion, texts: list[str]) -> tuple[str, list[Count]]:
    """Writes the new vocabulary; returns its fingerprint and the token counts of the texts. Rank 0 only."""
    from megatron_capgap.data.tokenizer import open_tokenizer
    from megatron_capgap.data.vocab_merge import count

    (staged / TOKENIZER).write_bytes(expansion.model)
    before, after = (open_tokenizer(str(file)) for file in (first, staged / TOKENIZER))
    return after.fingerprint, [count(text, before, after) for text in texts]


def grow(checkpoint: Path, staged: Path, out: Path, expansion: Expansion, fingerprint: str) -> CheckpointMetadata:
    """Writes the expanded checkpoint. Collective."""
    from megatron_capgap.checkpoint.vocab_expansion import NewTokens
    from megatron_capgap.checkpoint.vocab_expansion import expand_vocab as grow_checkpoint

    new = NewTokens(expansion.known, expansion.splits, str(out / TOKENIZER), fingerprint)
    return grow_checkpoint(checkpoint, staged, new)


def report(
    args: argparse.Namespace, expansion: Expansion, counts: list[Count], grown: CheckpointMetadata | None
) -> None:
    added = len(expansion.splits)
    print(
        f"{added} pieces added to {expansion.known}: {expansion.known + added} tokens; {expansion.shared} of "
        f"{args.add} exist already, {expansion.special} are not text"
    )
    for text, found in zip(args.text, counts, strict=True):
        before, after = found.before / found.characters, found.after / found.characters
        print(
            f"{text}: {found.characters} characters, {found.before} tokens before ({before:.3f} per character), "
            f"{found.after} after ({after:.3f})"
        )
    print(f"wrote {Path(args.out) / TOKENIZER}")
    if grown is not None and grown.expanded_from is not None:
        old = grown.expanded_from
        print(f"wrote {args.out}: vocabulary {old.model.vocab} -> {grown.model.vocab}, from {old.checkpoint}")


if __name__ == "__main__":
    sys.exit(main())
