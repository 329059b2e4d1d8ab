"""Imports a Hugging Face folder into a run directory with one checkpoint, loadable in any layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.checkpoint import streaming as storage
from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.checkpoint.streaming import Block
from megatron_capgap.common.errors import UserError
from megatron_capgap.conversion import tensor_mapping
from megatron_capgap.conversion.hf_config import read_json
from megatron_capgap.conversion.hf_folder import HfFolder, listed, open_hf_folder
from megatron_capgap.conversion.output_folder import refuse_existing, refuse_to_lose, replacing
from megatron_capgap.conversion.safetensors import Files, Stored, cast
from megatron_capgap.conversion.tensor_mapping import TensorTarget
from megatron_capgap.data.template_files import TEMPLATES
from megatron_capgap.data.tokenizer import open_tokenizer
from megatron_capgap.devices import Device
from megatron_capgap.distributed.collectives import run_on_all_ranks, run_on_rank0
from megatron_capgap.models import packing

STAGE = "import"
CARRIED = "huggingface"
"""Folder of a run directory with the original configuration, tokenizer and generation settings."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "tekken.json",
)
GENERATION = "generation_config.json"
CARRIED_FILES = ("config.json", GENERATION, *TOKENIZER_FILES)

Progress = Callable[[int, int], None]
"""(bytes done by this rank, total bytes of this rank)."""


def import_folder(
    hf: Path, out: Path, device: Device, *, dtype: torch.dtype | None, force: bool, progress: Progress
) -> HfFolder:
    """Imports a model. Collective; each rank reads and writes its share of the bytes.

    Args:
        hf: the Hugging Face folder.
        out: the run directory to create.
        device: a CPU device.
        dtype: type of the weights; None keeps the type of each.
        force: whether to replace an earlier import.
        progress: called after each block.

    Raises:
        UserError: the import is not possible; raised before anything is written, where possible.
    """
    refuse_existing(out, _imported, force)
    refuse_to_lose(hf, out)

    def look() -> tuple[HfFolder, str]:
        if (hf / GENERATION).is_file():
            read_json(hf / GENERATION)  # validated only: it is copied unchanged, and exported again
        source, tokenizer = open_hf_folder(hf), open_tokenizer(str(hf))
        return replace(source, remarks=tokenizer.remarks), tokenizer.fingerprint

    source, fingerprint = run_on_all_ranks(look)
    targets = tensor_mapping.expand_mapping(source.family, source.shape, device)

    def match() -> tuple[dict[str, Stored], dict[str, torch.dtype]]:
        tensors = _matched(source, targets)
        return tensors, _types(targets, tensors, dtype)

    tensors, types = run_on_all_ranks(match)
    of_piece = {
        piece: target
        for target in targets
        for piece in target.pieces(target.entry(source.shape.layers, types[target.key]))
    }
    mine = storage.blocks_of_rank(list(of_piece), dist.get_rank(), dist.get_world_size())
    produce = _BlockReader(of_piece, tensors, sum(piece.nbytes for piece in mine), progress)
    with replacing(out, _imported, force=force) as staged:
        checkpoint = staged / "checkpoints" / ".step_0.incomplete"
        run_on_rank0(lambda: checkpoint.mkdir(parents=True))
        try:
            storage.write(checkpoint, mine, produce)
        finally:
            produce.close()

        def finish() -> None:
            metadata.write(_manifest(source, out, fingerprint), checkpoint)
            run_directory.publish(checkpoint, staged, step=0, keep=1)
            _carry(hf, staged / CARRIED)

        run_on_rank0(finish)
    return source


def _imported(run_dir: Path) -> bool:
    """Whether a run directory is an import, not a training run."""
    try:
        newest = run_directory.latest(run_dir)
        return newest is not None and metadata.read(newest).stage == STAGE
    except UserError:
        return False


def _matched(source: HfFolder, targets: Sequence[TensorTarget]) -> dict[str, Stored]:
    """The tensors of the source; each is used by exactly one target.

    Raises:
        UserError: tensors are missing or unexpected, or a shape contradicts config.json.
    """
    tensors = dict(source.tensors)
    if source.shape.tied_embeddings:
        _drop_copy_of_embedding(source, tensors)
    wanted: dict[str, tuple[int, ...]] = {}
    for target in targets:
        for name, size in zip(target.parts, target.part_shapes(), strict=True):
            assert name not in wanted, f"{name} is in the table twice"
            wanted[name] = size
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(f"{source.folder}: missing {listed(missing)}; give all files of a {source.family.name} model")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"{source.folder}: unexpected {listed(extra)}; config.json describes a model without them")
    for name, stored in tensors.items():
        if stored.shape != wanted[name]:
            raise UserError(
                f"{stored.file}: {name} is {list(stored.shape)}, config.json expects {list(wanted[name])}; "
                "use the config.json of these weights"
            )
    return tensors


def _drop_copy_of_embedding(source: HfFolder, tensors: dict[str, Stored]) -> None:
    """Removes an LM head that a file stores although it is tied; it must equal the embedding."""
    names = {mapping.megatron: mapping.hf[0] for mapping in source.family.mappings}
    head = tensors.pop(names["output_layer.weight"], None)
    embedding = tensors.get(names["embedding.word_embeddings.weight"])
    if head is None or embedding is None:
        return
    files = Files()
    step = max(1, storage.BLOCK_BYTES // max(1, head.row_bytes))
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
        torch.equal(*(files.read(one, row, min(step, head.shape[0] - row)) for one in (head, embedding)))
        for row in range(0, head.shape[0], step)
    )
    files.close()
    if not same:
        raise UserError(
            f"{head.file}: {names['output_layer.weight']} differs from the embedding, but config.json ties them; "
            "set tie_word_embeddings to false"
        )


def _types(
    targets: Sequence[TensorTarget], tensors: dict[str, Stored], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Type of each checkpoint entry."""
    found: dict[str, torch.dtype] = {}
    for target in targets:
        for name in target.parts:
            kept = dtype or tensors[name].dtype
            if found.setdefault(target.key, kept) != kept:
                raise UserError(
                    f"{tensors[name].file}: {name} is {kept}, the same tensor of other layers is {found[target.key]}; "
                    "choose one type with --dtype"
                )
    return found


class _BlockReader:
    """Produces blocks of the checkpoint from rows of the source."""

    def __init__(
        self, of_piece: dict[Block, TensorTarget], tensors: dict[str, Stored], total: int, progress: Progress
    ) -> None:
        self._of_piece, self._tensors, self._files = of_piece, tensors, Files()
        self._total, self._done, self._progress = total, 0, progress

    def __call__(self, piece: Block) -> Tensor:
        target = self._of_piece[piece]
        parts = [self._tensors[name] for name in target.parts]
        rows = torch.empty((piece.count, *target.shape[1:]), dtype=piece.entry.dtype)
        whole = [self._files.read(part).t() for part in parts] if target.mapping.transposed else None
        for run in packing.parts_of_rows(target.row_blocks, piece.start, piece.count):
            place = rows.narrow(0, run.packed - piece.start, run.count)
            part = parts[run.part]
            if whole:
                place.copy_(cast(whole[run.part].narrow(0, run.start, run.count), place.dtype, target.parts[run.part]))
            elif part.dtype == place.dtype:
                self._files.read_into(place, part, run.start)
            else:
                read = self._files.read(part, run.start, run.count)
                place.copy_(cast(read, place.dtype, target.parts[run.part]))
        self._done += piece.nbytes
        self._progress(self._done, self._total)
        return rows

    def close(self) -> None:
        """Closes the source's files."""
        self._files.close()


def _manifest(source: HfFolder, out: Path, fingerprint: str) -> CheckpointMetadata:
    return CheckpointMetadata(
        step=0,
        steps=0,
        tokens=0,
        model=source.shape,
        tokenizer=str(out / CARRIED),
        tokenizer_fingerprint=fingerprint,
        stage=STAGE,
        seed=0,
        parallel_sizes=(1, 1, 1, dist.get_world_size()),
        sequence_length=source.shape.max_positions or 1,
    )


def _carry(hf: Path, folder: Path) -> None:
    folder.mkdir()
    copy_files(hf, folder, CARRIED_FILES)


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copies the files that exist, and named chat templates."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for template in sorted((source / TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / TEMPLATES / template.name)
