"""Expands the vocabulary of a checkpoint block by block: no rank needs memory for a complete model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.checkpoint import streaming as storage
from megatron_capgap.checkpoint.metadata import CheckpointMetadata, ModelRef
from megatron_capgap.checkpoint.streaming import Block, Reader, TensorEntry
from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed.collectives import run_on_rank0

STAGE = "expand_vocab"
_LAYERS = "decoder.layers."
# Other entries of a checkpoint are training state of the run that wrote it.
_MODEL = ("embedding", "decoder", "output_layer")
_OVER_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class NewTokens:
    """The new tokens and their tokenizer."""

    known: int
    """Ids below this are unchanged; new ids start here."""
    splits: Sequence[Sequence[int]]
    """For each new token, the old tokens whose rows are averaged for its row."""
    tokenizer: str
    """Path of the new tokenizer."""
    fingerprint: str
    """Hash of its vocabulary."""


def expand_vocab(checkpoint: Path, run_dir: Path, new: NewTokens) -> CheckpointMetadata:
    """Writes a checkpoint with rows for new tokens in embedding and LM head. Collective; each rank reads and writes its
    share of the bytes.

    All other tensors and all types are unchanged. Optimizer state is not copied.

    Args:
        checkpoint: the old checkpoint, RUN/checkpoints/step_N.
        run_dir: an empty folder; the new checkpoint becomes its only one, step 0.
        new: the tokens.

    Returns:
        Metadata of the new checkpoint.

    Raises:
        UserError: the checkpoint does not match its metadata or cannot be read, or a file cannot be written; raised on
            all ranks.
    """
    old = metadata.read(checkpoint)
    grown = _manifest(checkpoint, old, new)
    growing = _VocabExpander(checkpoint, old, new, grown.model.vocab)
    pieces = [
        piece
        for entry in growing.entries
        for layer in range(entry.shape[0] if entry.layered else 1)
        for piece in storage.blocks(entry, layer)
    ]
    mine = storage.blocks_of_rank(pieces, dist.get_rank(), dist.get_world_size())
    staged = run_dir / "checkpoints" / ".step_0.incomplete"
    run_on_rank0(lambda: staged.mkdir(parents=True))
    storage.write(staged, mine, growing)

    def finish() -> None:
        metadata.write(grown, staged)
        run_directory.publish(staged, run_dir, step=0, keep=1)

    run_on_rank0(finish)
    return grown


def _manifest(checkpoint: Path, old: CheckpointMetadata, new: NewTokens) -> CheckpointMetadata:
    return CheckpointMetadata(
        step=0,
        steps=0,
        tokens=0,
        # A padded model already has rows for the first new tokens.
        model=replace(old.model, vocab=max(old.model.vocab, new.known + len(new.splits))),
        tokenizer=new.tokenizer,
        tokenizer_fingerprint=new.fingerprint,
        stage=STAGE,
        seed=old.seed,
        parallel_sizes=(1, 1, 1, dist.get_world_size()),
        sequence_length=old.sequence_length,
        pruned_from=old.pruned_from,
        padding=old.padding,
        expanded_from=ModelRef.of(checkpoint, old),
    )


class _VocabExpander:
    """Produces blocks of the new checkpoint from rows of the old one.

    Args:
        checkpoint: the old checkpoint.
        old: its metadata.
        new: the new tokens.
        vocab: rows of the new embedding.

    Raises:
        UserError: see `expand_vocab`.
    """

    def __init__(self, checkpoint: Path, old: CheckpointMetadata, new: NewTokens, vocab: int) -> None:
        self._reader, self._new = Reader(checkpoint), new
        there = self._reader.tensors()
        self._sources = {
            key: TensorEntry(key, size, dtype, key.startswith(_LAYERS))
            for key, (size, dtype) in there.items()
            if key.partition(".")[0] in _MODEL and not key.endswith("_extra_state")
        }
        for key in _OVER_VOCABULARY[: 1 if old.model.tied_embeddings else 2]:
            if key not in self._sources:
                raise UserError(f"{checkpoint}: {key} is missing; use a checkpoint of this model")
            size = self._sources[key].shape
            # Rows beyond the vocabulary are padding of the layout that wrote the checkpoint.
            if len(size) != 2 or size[0] < old.model.vocab or size[1] != old.model.hidden:
                wanted = [old.model.vocab, old.model.hidden]
                raise UserError(
                    f"{checkpoint}: {key} is {list(size)}, the model's is {wanted}; use a complete checkpoint"
                )
        self.entries = [
            replace(entry, shape=(vocab, *entry.shape[1:])) if key in _OVER_VOCABULARY else entry
            for key, entry in self._sources.items()
        ]
        """Entries of the new checkpoint."""

    def __call__(self, piece: Block) -> Tensor:
        """The block's rows `[count, ...]`, in the old type."""
        source = self._sources[piece.entry.key]
        if piece.entry.key not in _OVER_VOCABULARY:
            return self._reader.read(replace(piece, entry=source))
        rows = torch.empty((piece.count, *source.inner), dtype=source.dtype)
        first, end = self._new.known, self._new.known + len(self._new.splits)
        last = piece.start + piece.count
        self._copy(source, rows, piece.start, piece.start, min(last, first))
        self._copy(source, rows, piece.start, max(piece.start, end), last)
        start, stop = max(piece.start, first), min(last, end)
        if start < stop:
            rows[start - piece.start : stop - piece.start] = self._means(source, start - first, stop - first)
        return rows

    def _copy(self, source: TensorEntry, rows: Tensor, origin: int, start: int, stop: int) -> None:
        """Copies old rows `start` to `stop` into `rows`, whose first row is `origin`."""
        if start < stop:
            rows[start - origin : stop - origin] = self._reader.read(Block(source, 0, start, stop - start))

    def _means(self, source: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows of new tokens `start` to `stop`, counted from the first new token: float64 `[stop - start, h]`.

        Streams the old matrix in blocks.
        """
        splits = self._new.splits[start:stop]
        sums = torch.zeros((len(splits), *source.inner), dtype=torch.float64)
        for block in storage.blocks(source, 0):
            rows = self._reader.read(block)
            for total, split in zip(sums, splits, strict=True):
                inside = [i - block.start for i in split if 0 <= i - block.start < block.count]
                if inside:
                    total += rows[inside].double().sum(0)
        return sums / torch.tensor([[len(split)] for split in splits])
