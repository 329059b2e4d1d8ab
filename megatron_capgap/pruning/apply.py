"""Writes the student's checkpoint from the teacher's and a plan, block by block: no rank holds a whole model."""

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
from megatron_capgap.pruning.prune_plan import Plan, spread

_LAYERS = "decoder.layers."
# The norms of a layer, in the order of a plan's gains.
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


def apply(checkpoint: Path, plan: Plan, staged: Path) -> None:
    """Writes the tensors of the student's checkpoint. Collective; each rank reads and writes its share of the bytes.

    Args:
        checkpoint: the teacher's.
        plan: the parts to keep.
        staged: an empty folder.

    Raises:
        UserError: the checkpoint does not match its metadata or cannot be read, or a file cannot be written; raised on
            all ranks.
    """
    cutting = _Pruner(checkpoint, plan)
    pieces = [
        piece
        for entry in cutting.entries
        for layer in range(entry.shape[0] if entry.layered else 1)
        for piece in storage.blocks(entry, layer)
    ]
    mine = storage.blocks_of_rank(pieces, dist.get_rank(), dist.get_world_size())
    storage.write(staged, mine, cutting)


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
        plan: the parts to keep.

    Raises:
        UserError: see `apply`.
    """

    def __init__(self, checkpoint: Path, plan: Plan) -> None:
        self._plan = plan
        self._axes = axes_of(plan.teacher)
        self._kept: dict[tuple[str, int], list[int]] = {}
        self._reader = Reader(checkpoint)
        self._sources = self._checked(checkpoint)
        self.entries = [self._entry(key, source) for key, source in self._sources.items()]
        """Of the student's tensors."""

    def __call__(self, piece: Block) -> Tensor:
        """The block's rows `[count, ...]`, in the teacher's dtype."""
        key, source = piece.entry.key, self._sources[piece.entry.key]
        rows = self._rows(self._axes[key][0], piece.layer)[piece.start : piece.start + piece.count]
        layer = self._plan.layers[piece.layer] if source.layered else 0
        kept = [row for row in rows if row >= 0]
        if not kept:
            return torch.zeros((piece.count, *piece.entry.inner), dtype=source.dtype)
        first, count = kept[0], kept[-1] - kept[0] + 1
        block = self._reader.read(Block(source, layer, first, count))
        block = _index_select(block, 0, [row - first if row >= 0 else -1 for row in rows])
        if len(self._axes[key]) > 1:
            block = _index_select(block, 1, self._rows(self._axes[key][1], piece.layer))
        gain = self._gain(key, piece.layer)
        return block if gain == 1.0 else (block.double() * gain).to(block.dtype)

    def _checked(self, checkpoint: Path) -> dict[str, TensorEntry]:
        """The teacher's tensors, after a check of their sizes against the shape in its metadata."""
        there, found = self._reader.tensors(), {}
        for key, axes in self._axes.items():
            if key not in there:
                raise UserError(f"{checkpoint}: {key} is missing; use a checkpoint of this model")
            size, dtype = there[key]
            layered = key.startswith(_LAYERS)
            wanted = tuple(self._length(axis) for axis in axes)
            # Rows beyond the vocabulary are padding, which depends on the layout that wrote them.
            inner = size[1:] if layered else (min(size[0], wanted[0]), *size[1:])
            if inner != wanted or (layered and size[0] != self._plan.teacher.layers):
                raise UserError(f"{checkpoint}: {key} is {list(size)}, expected {list(wanted)} in each layer")
            found[key] = TensorEntry(key, size, dtype, layered)
        return found

    def _entry(self, key: str, source: TensorEntry) -> TensorEntry:
        size = tuple(len(self._rows(axis, 0)) for axis in self._axes[key])
        return TensorEntry(
            key, (len(self._plan.layers), *size) if source.layered else size, source.dtype, source.layered
        )

    def _gain(self, key: str, layer: int) -> float:
        """The factor of a norm's gain; 1 for other tensors."""
        if key == "decoder.final_layernorm.weight":
            return self._plan.gains[-1]
        for number, name in enumerate(_NORMS):
            if key == f"{_LAYERS}{name}weight":
                return self._plan.gains[2 * layer + number]
        return 1.0

    def _length(self, axis: str) -> int:
        """The teacher's size along an axis."""
        shape = self._plan.teacher
        width, groups = derived.head_dim(shape), derived.kv_heads(shape)
        fc1 = (2 if ARCHITECTURES[shape.family].gated else 1) * shape.ffn
        return {
            "vocabulary": shape.vocab,
            "positions": shape.max_positions or 0,
            "channels": shape.hidden,
            "head": width,
            "qkv": (shape.heads + 2 * groups) * width,
            "context": shape.heads * width,
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
        plan, (before, after) = self._plan, (self._plan.teacher, self._plan.student)
        if axis == "channels":
            return list(plan.channels)
        if axis in ("neurons", "fc1"):
            neurons = spread(plan.neurons[layer], after.ffn, plan.tensor)
            if axis == "neurons" or not ARCHITECTURES[before.family].gated:
                return neurons
            return packing.arranged(packing.gate_up(before), packing.gate_up(after), [neurons] * 2)
        if axis in ("qkv", "context"):
            groups = spread(plan.groups[layer], derived.kv_heads(after), plan.tensor)
            heads = self._wide(self._queries(groups, layer))
            if axis == "context":
                return heads
            key_values = self._wide(groups)
            return packing.arranged(packing.qkv(before), packing.qkv(after), (heads, key_values, key_values))
        return list(range(self._length(axis)))

    def _queries(self, groups: Sequence[int], layer: int) -> list[int]:
        """The query heads that are kept, equally many of each group; -1 for those of a group of zeros."""
        heads, count = self._plan.heads[layer], self._plan.student.heads // derived.kv_heads(self._plan.student)
        of_group = {group: heads[i * count : (i + 1) * count] for i, group in enumerate(self._plan.groups[layer])}
        return [head for group in groups for head in of_group.get(group, (-1,) * count)]

    def _wide(self, heads: Sequence[int]) -> list[int]:
        """The rows of the given heads, each of the teacher's head width."""
        width = derived.head_dim(self._plan.teacher)
        return [head * width + i if head >= 0 else -1 for head in heads for i in range(width)]


def _index_select(block: Tensor, dim: int, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor along a dimension; zeros for -1."""
    index = torch.tensor(rows)
    return block.index_select(dim, index.clamp(min=0)).index_fill_(dim, (index < 0).nonzero().flatten(), 0)
