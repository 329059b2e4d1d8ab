"""What every stage of the recipe would be on N GPUs, before any of its models is there.

    python examples/minima_3b/check.py --gpus 16

`--check` wants to know of a checkpoint what it says of itself, and of a tokenizer that it is the checkpoint's. Both are
made up in a scratch folder: LLaMA2-7B with the paper's vocabulary, and what each stage would make of it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

import sentencepiece

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.common.errors import UserError
from megatron_capgap.config.loader import load
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.data.tokenizer import open_tokenizer
from megatron_capgap.stages import check
from megatron_capgap.stages.resolve import resolve

HERE = Path(__file__).resolve().parent
STAGES = ("adapt", "prune", "distill", "finetune", "evaluate")
EXPANDED = Path("runs/llama2_7b_expanded")
# LLaMA2-7B's config.json; the vocabulary is that of the adapted model and of MiniMA-3B.
LLAMA2_7B = ModelShape(layers=32, hidden=4096, heads=32, ffn=11008, vocab=49216, max_positions=4096)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 with one line on stderr for each thing that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks in all, as --check-world")
    gpus = parser.parse_args(argv).gpus
    before = os.getcwd()
    try:
        with TemporaryDirectory() as scratch:
            os.chdir(scratch)
            for stage, report in reports(gpus):
                print(f"== {stage}.yaml on {gpus} GPUs\n\n{report}")
    except UserError as error:
        print(f"check: error: {error}", file=sys.stderr)
        return 2
    finally:
        os.chdir(before)
    return 0


def reports(gpus: int) -> list[tuple[str, str]]:
    """What `--check` says of each stage; makes models up below the current folder, which is to be an empty one."""
    EXPANDED.mkdir(parents=True)
    write_tokenizer(EXPANDED / "tokenizer.model")
    pretend(EXPANDED, LLAMA2_7B, 4096)
    said = []
    for stage in STAGES:
        loaded = load(str(HERE / f"{stage}.yaml"), [], stage)
        said.append((stage, check.report(loaded, stage, gpus)))
        if stage != "evaluate":
            model = resolve(loaded, stage, gpus).student
            pretend(Path(loaded.config.run_dir), model, loaded.config.data.sequence_length)
    return said


def write_tokenizer(file: Path) -> None:
    """A vocabulary of bytes; `--check` asks for no more tokens than the model has rows."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"]), model_writer=model, vocab_size=262, byte_fallback=True, minloglevel=2
    )
    file.write_bytes(model.getvalue())


def pretend(run_dir: Path, shape: ModelShape, sequence_length: int) -> None:
    """The words of a checkpoint without its tensors."""
    folder = run_dir / "checkpoints" / "step_0"
    folder.mkdir(parents=True)
    tokenizer = str(EXPANDED / "tokenizer.model")
    meta = CheckpointMetadata(
        step=0,
        steps=0,
        tokens=0,
        model=shape,
        tokenizer=tokenizer,
        tokenizer_fingerprint=open_tokenizer(tokenizer).fingerprint,
        stage="made up",
        seed=0,
        parallel_sizes=(1, 1, 1, 1),
        sequence_length=sequence_length,
    )
    metadata.write(meta, folder)
    run_directory.set_latest(folder)


if __name__ == "__main__":
    sys.exit(main())
