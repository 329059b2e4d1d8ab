"""Exports a distributed checkpoint of any layout to a Hugging Face folder that transformers loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.checkpoint.streaming import Reader, TensorEntry
from megatron_capgap.common.errors import UserError
from megatron_capgap.config import architectures as traits
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion import model_card, tensor_mapping, tokenizer_check, tokenizer_files
from megatron_capgap.conversion.family import Family
from megatron_capgap.conversion.hf_config import read_config, read_json
from megatron_capgap.conversion.hf_folder import listed
from megatron_capgap.conversion.importing import CARRIED, GENERATION, Progress
from megatron_capgap.conversion.output_folder import refuse_existing, refuse_to_lose, replacing
from megatron_capgap.conversion.registry import FAMILIES
from megatron_capgap.conversion.safetensors import Writer, cast
from megatron_capgap.conversion.tensor_mapping import TensorTarget
from megatron_capgap.devices import Device
from megatron_capgap.distributed.collectives import gather_from_ranks, run_on_all_ranks, run_on_rank0
from megatron_capgap.models import fp8_scales, packing, projections

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Other entries that a training run saves in a checkpoint.
_NOT_WEIGHTS = (
    rf"(optimizer|random)\b.*|({re.escape(projections.PREFIX)}|{re.escape(fp8_scales.PREFIX)}).*|.*_extra_state.*"
)


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: TensorTarget
    part: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def export_checkpoint(
    checkpoint: str,
    out: Path,
    device: Device,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    force: bool,
    progress: Progress,
) -> str | None:
    """Exports a checkpoint. Collective; the files are distributed over the ranks.

    Args:
        checkpoint: a run directory or RUN/checkpoints/step_N.
        out: the folder to create.
        device: a CPU device.
        dtype: type of the weights; None keeps the type of each.
        max_shard_bytes: maximum size of a file; a larger tensor gets a file of its own.
        force: whether to replace an earlier export.
        progress: called after each block of rows.

    Returns:
        A warning for users of the folder, if any.

    Raises:
        UserError: the export is not possible; raised before anything is written, where possible.
    """
    refuse_existing(out, _exported, force)

    def look() -> tuple[CheckpointMetadata, tokenizer_files.Words, Reader, dict[str, dict[str, Any]], str, str | None]:
        folder = run_directory.locate(checkpoint)
        refuse_to_lose(folder, out)
        meta = metadata.read(folder)
        carried = _carried(folder, meta)
        words, warning = tokenizer_files.find(carried, meta)
        config = config_of(FAMILIES[meta.model.family], meta, carried, words)
        files = {"config.json": config, GENERATION: _generation(carried, config, words)}
        words, note = tokenizer_check.settle(files, words, meta.chat_template)
        caution = ". ".join(filter(None, (warning, note))) or None
        card = model_card.text(folder, meta, FAMILIES[meta.model.family], caution)
        return meta, words, Reader(folder), files, card, caution

    meta, words, reader, written, card, caution = run_on_all_ranks(look)
    targets = tensor_mapping.expand_mapping(FAMILIES[meta.model.family], meta.model, device)
    entries = run_on_all_ranks(lambda: _entries(checkpoint, reader, targets, meta.model.layers))
    files = _files(_tensors(targets, entries, dtype), max_shard_bytes)
    written["config.json"]["torch_dtype"] = _NAMES[next(iter(files.values()))[0].dtype]
    with replacing(out, _exported, force=force) as staged:
        gather_from_ranks(lambda: _write_share(staged, files, reader, entries, progress))

        def finish() -> None:
            _write_index(staged, files)
            for name, content in written.items():
                _write_json(staged / name, content)
            tokenizer_files.write(staged, words, meta.chat_template)
            (staged / "README.md").write_text(card, encoding="utf-8")

        run_on_rank0(finish)
    return caution


def _exported(folder: Path) -> bool:
    """Whether a folder is an export of this project, which may be replaced."""
    words = folder / "README.md"
    ours = words.is_file() and model_card.EXPORTED in words.read_text(encoding="utf-8", errors="replace")
    return ours and (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _carried(folder: Path, meta: CheckpointMetadata) -> Path | None:
    """Folder of the original Hugging Face files: of an import, or the tokenizer folder of the run."""
    for place in (folder.parents[1] / CARRIED, Path(meta.tokenizer)):
        if place.is_dir():
            return place
    return None


def _entries(checkpoint: str, reader: Reader, targets: Sequence[TensorTarget], layers: int) -> dict[str, TensorEntry]:
    """Checkpoint entry of every tensor of the model.

    Raises:
        UserError: a tensor is missing, has another shape or is unexpected.
    """
    there = reader.tensors()
    found: dict[str, TensorEntry] = {}
    for target in targets:
        if target.key not in there:
            raise UserError(f"{checkpoint}: {target.key} is missing; use a checkpoint of this model")
        size, dtype = there[target.key]
        entry = target.entry(layers, dtype)
        # Rows beyond the vocabulary are padding of the layout that wrote the checkpoint.
        padded = target.key.startswith(("embedding.word_embeddings.", "output_layer."))
        if size != entry.shape and not (padded and size[1:] == entry.shape[1:] and size[0] > entry.shape[0]):
            raise UserError(f"{checkpoint}: {target.key} is {list(size)}, the model's is {list(entry.shape)}")
        found[target.key] = TensorEntry(target.key, size, dtype, target.layered)
    extra = sorted(key for key in there.keys() - found.keys() if not re.fullmatch(_NOT_WEIGHTS, key))
    if extra:
        raise UserError(
            f"{checkpoint}: unexpected {listed(extra)}; its model has no such tensor, use another checkpoint"
        )
    return found


def _tensors(
    targets: Sequence[TensorTarget], entries: dict[str, TensorEntry], dtype: torch.dtype | None
) -> list[Tensor]:
    return [
        Tensor(name, shape, dtype or entries[target.key].dtype, target, part)
        for target in targets
        for part, (name, shape) in enumerate(zip(target.parts, target.part_shapes(), strict=True))
    ]


def _files(tensors: Sequence[Tensor], most: int) -> dict[str, list[Tensor]]:
    """Groups tensors into files of at most `most` bytes, in order; a larger tensor gets a file of its own."""
    groups: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if groups[-1] and held + tensor.nbytes > most:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_share(
    folder: Path, files: dict[str, list[Tensor]], reader: Reader, entries: dict[str, TensorEntry], progress: Progress
) -> None:
    """Writes the files of this rank (round-robin)."""
    mine = dict(list(files.items())[dist.get_rank() :: dist.get_world_size()])
    done, total = 0, sum(tensor.nbytes for tensors in mine.values() for tensor in tensors)
    for name, tensors in mine.items():
        writer = Writer(folder / name, {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
        for nbytes in _fill(writer, tensors, reader, entries):
            done += nbytes
            progress(done, total)
        writer.close()


def _fill(writer: Writer, tensors: Sequence[Tensor], reader: Reader, entries: dict[str, TensorEntry]) -> Iterator[int]:
    """Writes the tensors of a file, reading each Megatron tensor once for all its parts in the file; yields bytes."""
    wanted: dict[tuple[str, int], list[Tensor]] = {}
    for tensor in tensors:
        wanted.setdefault((tensor.target.key, tensor.target.layer), []).append(tensor)
    for group in wanted.values():
        target, names = group[0].target, {tensor.part: tensor for tensor in group}
        for piece in target.pieces(entries[target.key]):
            rows = reader.read(piece)
            if target.mapping.transposed:
                yield _write_transposed(writer, names, target, rows)
                continue
            for run in packing.parts_of_rows(target.row_blocks, piece.start, piece.count):
                if (target_tensor := names.get(run.part)) is not None:
                    part = rows.narrow(0, run.packed - piece.start, run.count)
                    writer.write(target_tensor.name, run.start, cast(part, target_tensor.dtype, target_tensor.name))
                    yield part.numel() * target_tensor.dtype.itemsize


def _write_transposed(writer: Writer, names: dict[int, Tensor], target: TensorTarget, packed: torch.Tensor) -> int:
    """Writes a matrix that Hugging Face stores as `[in, out]`: unpacks its rows, then writes the complete transpose."""
    (tensor,) = names.values()
    whole = torch.empty_like(packed)
    for run in target.row_blocks:
        whole[run.start : run.start + run.count] = packed[run.packed : run.packed + run.count]
    writer.write(tensor.name, 0, cast(whole.t(), tensor.dtype, tensor.name))
    return tensor.nbytes


def config_of(
    family: Family, meta: CheckpointMetadata, carried: Path | None, words: tokenizer_files.Words
) -> dict[str, Any]:
    """Builds config.json: keys of the shape override those of the original config.json."""
    shape = meta.model
    if traits.ARCHITECTURES[family.name].heads_divide_hidden and shape.hidden % shape.heads:
        raise UserError(
            f"{meta.model.family} of hidden {shape.hidden} and heads {shape.heads}: transformers loads no "
            f"{family.name} whose heads do not divide hidden, even with head_dim; prune or train one whose heads do"
        )
    known = read_json(carried / "config.json") if carried and (carried / "config.json").is_file() else {}
    return {
        "bos_token_id": known.get("bos_token_id", words.bos_token_id),
        **_kept(family, shape, known),
        "eos_token_id": _ends(known, words),
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.config(shape, shape.max_positions or meta.sequence_length),
    }


def _kept(family: Family, shape: ModelShape, known: dict[str, Any]) -> dict[str, Any]:
    """Keys of the original config.json that the shape does not set; only the pad token id if the file is of another
    model with the same tokenizer."""
    try:
        same = read_config(Path("config.json"), known) == (family, shape)
    except UserError:
        same = False
    if not same:
        return {"pad_token_id": known["pad_token_id"]} if known.get("pad_token_id") is not None else {}
    # Drop custom code, and keys of positions and type that the shape's keys replace.
    return {key: value for key, value in known.items() if key not in ("auto_map", "rope_parameters", "dtype")}


def _ends(known: dict[str, Any], words: tokenizer_files.Words) -> int | list[int] | None:
    """Value of eos_token_id: one id, or a list as in LLaMA 3. The original value is kept if it has the same ids.

    Args:
        known: content of the original file.
        words: the tokenizer with its stop ids.
    """
    before = known.get("eos_token_id")
    if set(before if isinstance(before, list) else [before]) == words.ends:
        return before
    found = sorted(words.ends, key=lambda token: (token != words.eos_token_id, token))
    return found if len(found) > 1 else found[0] if found else None


def _generation(carried: Path | None, config: dict[str, Any], words: tokenizer_files.Words) -> dict[str, Any]:
    if carried and (carried / GENERATION).is_file():
        known = read_json(carried / GENERATION)
        return {**known, "eos_token_id": _ends(known, words)} if words.ends or "eos_token_id" in known else known
    return {"_from_model_config": True, **{key: config[key] for key in ("bos_token_id", "eos_token_id")}}


def _write_index(folder: Path, files: dict[str, list[Tensor]]) -> None:
    if len(files) == 1:
        return
    where = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
