"""Row-level mapping between Hugging Face and Megatron tensors: a family's table, expanded over a model's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_capgap.checkpoint.streaming import BLOCK_BYTES, Block, TensorEntry
from megatron_capgap.config.schema import Layout, ModelShape, Precision
from megatron_capgap.conversion.family import PACKINGS, Family, TensorMapping
from megatron_capgap.devices import Device
from megatron_capgap.distributed import parallel_context
from megatron_capgap.models import gpt, packing
from megatron_capgap.models.packing import PackedRows
from megatron_capgap.models.sharded_state import shards


@dataclass(frozen=True)
class TensorTarget:
    """One tensor of one layer of the Megatron model, and the Hugging Face tensors that it consists of."""

    mapping: TensorMapping
    key: str
    layer: int
    layered: bool
    shape: tuple[int, ...]
    """`[rows, ...]`, without vocabulary padding."""
    row_blocks: Sequence[PackedRows]
    parts: tuple[str, ...]
    """Full names of the parts in the Hugging Face model."""

    def part_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each part as Hugging Face stores it."""
        shapes = [(rows, *self.shape[1:]) for rows in packing.part_rows(self.row_blocks)]
        return [tuple(reversed(shape)) for shape in shapes] if self.mapping.transposed else shapes

    def entry(self, layers: int, dtype: torch.dtype) -> TensorEntry:
        """The checkpoint entry of this tensor, which spans all layers."""
        shape = (layers, *self.shape) if self.layered else self.shape
        return TensorEntry(self.key, shape, dtype, self.layered)

    def pieces(self, entry: TensorEntry) -> Iterator[Block]:
        """Yields the tensor in blocks of rows, or in one block if Hugging Face stores it transposed."""
        rows = self.shape[0]
        step = rows if self.mapping.transposed else max(1, BLOCK_BYTES // max(1, entry.bytes_a_row()))
        for start in range(0, rows, step):
            yield Block(entry, self.layer, start, min(step, rows - start))


def expand_mapping(family: Family, shape: ModelShape, device: Device) -> list[TensorTarget]:
    """Returns every tensor of a model, in the order of its layers. Collective.

    The list of tensors comes from Megatron's model itself; the table must match it.
    """
    wanted = _tensors_of(shape, device)
    mappings = family.mappings_of(shape)
    mapped_names = {mapping.megatron for mapping in mappings}
    assert mapped_names == wanted.keys(), (
        f"{family.name}: the table and the model differ in {sorted(mapped_names ^ wanted.keys())}"
    )
    layered = [mapping for mapping in mappings if "{layer}" in mapping.hf[0]]
    single = [mapping for mapping in mappings if mapping not in layered]
    first = [mapping for mapping in single if mapping.megatron.startswith("embedding.")]
    last = [mapping for mapping in single if mapping not in first]
    found = [_target(mapping, 0, False, wanted[mapping.megatron], shape) for mapping in first]
    for layer in range(shape.layers):
        found += [_target(mapping, layer, True, wanted[mapping.megatron], shape) for mapping in layered]
    return found + [_target(mapping, 0, False, wanted[mapping.megatron], shape) for mapping in last]


def _target(
    mapping: TensorMapping, layer: int, layered: bool, size: tuple[int, ...], shape: ModelShape
) -> TensorTarget:
    row_blocks = PACKINGS[mapping.packing](shape) if mapping.packing else packing.whole(size[0])
    assert sum(block.count for block in row_blocks) == size[0], (mapping, size)
    return TensorTarget(
        mapping,
        mapping.megatron,
        layer,
        layered,
        size,
        row_blocks,
        tuple(name.format(layer=layer) for name in mapping.hf),
    )


def _tensors_of(shape: ModelShape, device: Device) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of one layer and of those outside the layers, by key. Collective."""
    parallel = parallel_context.build(Layout(), seed=0)
    chunks = gpt.build(replace(shape, layers=1), parallel, Precision(), device, sequence_length=1)
    found = {shard.key: tuple(shard.global_shape[shard.prepend_axis_num :]) for shard in shards(chunks, parallel)}
    parallel_context.destroy()
    return found
