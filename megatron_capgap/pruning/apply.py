"""Writes the student's checkpoint from the teacher's and a selection, block by block: no rank holds a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.checkpoint import streaming as storage
from megatron_capgap.checkpoint.streaming import Block, Reader, TensorEntry
from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import packing
from megatron_capgap.pruning.prune_plan import PruningSelection, pad_per_shard

_LAYERS = "decoder.layers."
# The norms of a layer, in the order of a selection's gains.
_NORMS = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
# Axes of the outputs and inputs of each projection of a layer.
_LINEARS = (
    ("self_attention.linear_qkv.", "qkv", "channels"),
    ("self_attention.linear_proj.", "channels", "context"),
    ("mlp.linear_fc1.", "fc1", "channels"),
    ("mlp.linear_fc2.", "channels", "neurons"),
)

Axes = tuple[str, ...]
"""The axis name of each dimension of a layer's tensor."""


def apply(checkpoint: Path, selection: PruningSelection, staged: Path) -> None:
    """Writes the tensors of the student's checkpoint. Collective; each rank reads and writes its share of the bytes.

    Args:
        checkpoint: the teacher's.
        selection: the parts to keep.
        staged: an empty folder.

    Raises:
        UserError: the checkpoint does not match its metadata or cannot be read, or a file cannot be written; raised on
            all ranks.
    """
    pruner = _Pruner(checkpoint, selection)
    all_blocks = [
        block
        for entry in pruner.entries
        for layer in range(entry.shape[0] if entry.layered else 1)
        for block in storage.blocks(entry, layer)
    ]
    mine = storage.blocks_of_rank(all_blocks, dist.get_rank(), dist.get_world_size())
    storage.write(staged, mine, pruner)


def axes_of(shape: ModelShape) -> dict[str, Axes]:
    """The axes of every tensor of a model, by its key in a checkpoint."""
    traits = ARCHITECTURES[shape.family]
    norm = ("weight", "bias") if traits.norm == "LayerNorm" else ("weight",)
    found: dict[str, Axes] = {"embedding.word_embeddings.weight": ("vocabulary", "channels")}
    if traits.learned_positions:
        found["embedding.position_embeddings.weight"] = ("positions", "channels")
    for name in (*(_LAYERS + name for name in _NORMS), "decoder.final_layernorm."):
        found |= {f"{name}{kind}": ("channels",) for kind in norm}
    for name, outputs, inputs in _LINEARS:
        found[f"{_LAYERS}{name}weight"] = (outputs, inputs)
        if traits.linear_bias or (traits.qkv_bias and outputs == "qkv"):
            found[f"{_LAYERS}{name}bias"] = (outputs,)
    if traits.qk_norm:
        found |= {f"{_LAYERS}self_attention.{name}_layernorm.weight": ("head",) for name in "qk"}
    if not shape.tied_embeddings:
        found["output_layer.weight"] = ("vocabulary", "channels")
    return found


class _Pruner:
    """Builds blocks of the student's tensors from rows of the teacher's.

    Args:
        checkpoint: the teacher's.
        selection: the parts to keep.

    Raises:
        UserError: see `apply`.
    """

    def __init__(self, checkpoint: Path, selection: PruningSelection) -> None:
        self._selection = selection
        self._axes = axes_of(selection.teacher)
        self._kept: dict[tuple[str, int], list[int]] = {}
        self._reader = Reader(checkpoint)
        self._sources = self._checked(checkpoint)
        self.entries = [self._entry(key, source) for key, source in self._sources.items()]
        """Of the student's tensors."""

    def __call__(self, block: Block) -> Tensor:
        """The block's rows `[count, ...]`, in the teacher's dtype."""
        key, source = block.entry.key, self._sources[block.entry.key]
        rows = self._rows(self._axes[key][0], block.layer)[block.start : block.start + block.count]
        layer = self._selection.layers[block.layer] if source.layered else 0
        kept = [row for row in rows if row >= 0]
        if not kept:
            return torch.zeros((block.count, *block.entry.inner), dtype=source.dtype)
        first, count = kept[0], kept[-1] - kept[0] + 1
        tensor = self._reader.read(Block(source, layer, first, count))
        tensor = _index_select(tensor, 0, [row - first if row >= 0 else -1 for row in rows])
        if len(self._axes[key]) > 1:
            tensor = _index_select(tensor, 1, self._rows(self._axes[key][1], block.layer))
        gain = self._gain(key, block.layer)
        return tensor if gain == 1.0 else (tensor.double() * gain).to(tensor.dtype)

    def _checked(self, checkpoint: Path) -> dict[str, TensorEntry]:
        """The teacher's tensors, after a check of their sizes against the shape in its metadata."""
        stored, found = self._reader.tensors(), {}
        for key, axes in self._axes.items():
            if key not in stored:
                raise UserError(f"{checkpoint}: {key} is missing; use a checkpoint of this model")
            size, dtype = stored[key]
            layered = key.startswith(_LAYERS)
            expected = tuple(self._length(axis) for axis in axes)
            # Rows beyond the vocabulary are padding, which depends on the layout that wrote them.
            inner = size[1:] if layered else (min(size[0], expected[0]), *size[1:])
            if inner != expected or (layered and size[0] != self._selection.teacher.layers):
                raise UserError(f"{checkpoint}: {key} is {list(size)}, expected {list(expected)} in each layer")
            found[key] = TensorEntry(key, size, dtype, layered)
        return found

    def _entry(self, key: str, source: TensorEntry) -> TensorEntry:
        size = tuple(len(self._rows(axis, 0)) for axis in self._axes[key])
        return TensorEntry(
            key, (len(self._selection.layers), *size) if source.layered else size, source.dtype, source.layered
        )

    def _gain(self, key: str, layer: int) -> float:
        """The factor of a norm's gain; 1 for other tensors."""
        if key == "decoder.final_layernorm.weight":
            return self._selection.gains[-1]
        for number, name in enumerate(_NORMS):
            if key == f"{_LAYERS}{name}weight":
                return self._selection.gains[2 * layer + number]
        return 1.0

    def _length(self, axis: str) -> int:
        """The teacher's size along an axis."""
        shape = self._selection.teacher
        head_dim, kv_heads = derived.head_dim(shape), derived.kv_heads(shape)
        fc1 = (2 if ARCHITECTURES[shape.family].gated else 1) * shape.ffn
        return {
            "vocabulary": shape.vocab,
            "positions": shape.max_positions or 0,
            "channels": shape.hidden,
            "head": head_dim,
            "qkv": (shape.heads + 2 * kv_heads) * head_dim,
            "context": shape.heads * head_dim,
            "fc1": fc1,
            "neurons": shape.ffn,
        }[axis]

    def _rows(self, axis: str, layer: int) -> list[int]:
        """Rows of the teacher that are kept along an axis, ascending; -1 where the student has zeros.

        Args:
            axis: its name.
            layer: of the student, counted from 0.
        """
        if (axis, layer) not in self._kept:
            self._kept[axis, layer] = self._find_rows(axis, layer)
        return self._kept[axis, layer]

    def _find_rows(self, axis: str, layer: int) -> list[int]:
        selection, (before, after) = self._selection, (self._selection.teacher, self._selection.student)
        if axis == "channels":
            return list(selection.channels)
        if axis in ("neurons", "fc1"):
            neurons = pad_per_shard(selection.neurons[layer], after.ffn, selection.tensor)
            if axis == "neurons" or not ARCHITECTURES[before.family].gated:
                return neurons
            return packing.arranged(packing.gate_up(before), packing.gate_up(after), [neurons] * 2)
        if axis in ("qkv", "context"):
            kv_heads = pad_per_shard(selection.kv_heads[layer], derived.kv_heads(after), selection.tensor)
            heads = self._rows_of_heads(self._queries(kv_heads, layer))
            if axis == "context":
                return heads
            key_values = self._rows_of_heads(kv_heads)
            return packing.arranged(packing.qkv(before), packing.qkv(after), (heads, key_values, key_values))
        return list(range(self._length(axis)))

    def _queries(self, kv_heads: Sequence[int], layer: int) -> list[int]:
        """The query heads that are kept, equally many of each group; -1 for those of a group of zeros."""
        heads, count = (
            self._selection.heads[layer],
            self._selection.student.heads // derived.kv_heads(self._selection.student),
        )
        of_group = {
            group: heads[i * count : (i + 1) * count] for i, group in enumerate(self._selection.kv_heads[layer])
        }
        return [head for group in kv_heads for head in of_group.get(group, (-1,) * count)]

    def _rows_of_heads(self, heads: Sequence[int]) -> list[int]:
        """The rows of the given heads, each of the teacher's head width."""
        head_dim = derived.head_dim(self._selection.teacher)
        return [head * head_dim + i if head >= 0 else -1 for head in heads for i in range(head_dim)]


def _index_select(block: Tensor, dim: int, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor along a dimension; zeros for -1."""
    index = torch.tensor(rows)
    return block.index_select(dim, index.clamp(min=0)).index_fill_(dim, (index < 0).nonzero().flatten(), 0)
