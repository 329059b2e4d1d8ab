"""Counts what one call of the distillation loss asks of a GPU, eager and with Triton kernels, at full size.

    python benchmarks/loss_traffic.py [--divergence forward_kl] [--temperature 1]

Runs forward and backward on meta tensors, which have shapes and no data, and counts every operation: calls, kernels,
and bytes read and written. Needs neither a GPU nor memory; needs triton. Times are not predicted.

Columns: calls of operations and kernels, without collectives; bytes per entry of the logits [tokens, v/tp] in all
passes over them outside of the matrix products; GB over tensors of the head's gradient [v/tp, h] outside of them; the
collectives and their MB. An operation counts as one kernel, logsumexp as seven and masked_fill out of place as two, as
in PyTorch's sources. The eager rows are of a GPU's chunk without the kernels, and of the same chunk. Exits with 1 if
the kernels miss a target: at most 12 bytes an entry (16 without a chain rule), 0 for the head, 60 kernels a call.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_capgap.config import derived
from megatron_capgap.config.schema import WITHOUT_CHAIN_RULE
from megatron_capgap.losses import DistillationObjective, TeacherHidden, distillation_loss, vocab_shard
from megatron_capgap.losses.kernels import passes
from megatron_capgap.losses.vocab_shard import VocabShard

PRODUCTS = {"mm", "addmm", "addmm_"}
# Operations that launch nothing.
FREE = set(
    "_reshape_alias _unsafe_view alias as_strided detach empty empty_like empty_strided expand lift_fresh new_empty "
    "new_empty_strided permute select slice split squeeze t transpose unbind unflatten unsqueeze view".split()
)
WRITES_ONLY = set("fill_ full full_like new_full new_zeros ones ones_like zero_ zeros zeros_like".split())
KERNELS = {"logsumexp": 7, "masked_fill": 2}
BYTES_TARGET, MORE_WITHOUT_CHAIN_RULE, KERNELS_TARGET = 12.0, 4.0, 60


@dataclass(frozen=True)
class Size:
    """Of one rank: tokens, hidden sizes of student and teacher, vocabulary, tensor-parallel ranks."""

    tokens: int = 8192
    student: int = 4096
    teacher: int = 8192
    vocab: int = 128256
    tensor: int = 1

    @property
    def width(self) -> int:
        """Columns on a rank."""
        return self.vocab // self.tensor


SIZES = (Size(), Size(tensor=8), Size(vocab=151936), Size(vocab=151936, tensor=8))


@dataclass
class Traffic(TorchDispatchMode):
    """Counts of one call."""

    size: Size
    calls: int = 0
    kernels: int = 0
    of_logits: int = 0
    """Bytes of passes over the logits."""
    of_head: int = 0
    """Bytes over tensors of the size of the head."""
    collectives: int = 0
    sent: int = 0
    flops: float = 0.0
    launched: list[str] = field(default_factory=list)
    """Names of Triton kernels."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if name in FREE:
            return result
        self.calls += 1
        self.kernels += KERNELS.get(name, 1)
        inputs = [x for x in tree_leaves((args, {**kwargs, "out": None})) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in PRODUCTS:
            left, right = inputs[-2:]
            self.flops += 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            self._count(inputs, outputs, *_moved(name, inputs, outputs))
        return result

    def _count(self, inputs: list[Tensor], outputs: list[Tensor], read: int, written: int) -> None:
        shapes = [x.shape for x in (*inputs, *outputs) if x.dim() == 2]
        if any(shape[1] == self.size.width for shape in shapes):
            self.of_logits += read + written
        elif any(shape[0] == self.size.width for shape in shapes):
            self.of_head += read + written

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """In place of `passes.launch`."""
        name = kernel.fn.__name__
        self.launched.append(name)
        self.calls, self.kernels = self.calls + 1, self.kernels + 1
        if name in ("statistics_kernel", "gradient_kernel", "sums_kernel"):
            student, teacher = arguments[:2]
            tensors = [student]
            if options.get("MODE", passes.DENSE) == passes.DENSE:
                tensors.append(teacher)
            if name == "gradient_kernel":
                tensors.append(student)  # written
            self.of_logits += sum(x.numel() * x.element_size() for x in tensors)

    def collective(self, tensor: Tensor, *others: Any, **options: Any) -> None:
        """In place of a collective, whose largest tensor is the first argument."""
        self.collectives += 1
        self.sent += tensor.nbytes


def _moved(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int]:
    """Bytes that an operation reads and writes."""
    read, written = sum(map(_stored, inputs)), sum(map(_stored, outputs))
    if name == "copy_":
        read = _stored(inputs[1])
    elif name in WRITES_ONLY:
        read = 0
    elif name == "gather":
        read = written + _stored(inputs[1])
    elif name == "scatter_add_":
        read, written = 2 * _stored(inputs[2]) + _stored(inputs[1]), _stored(inputs[2])
    return read, written


def _stored(tensor: Tensor) -> int:
    """Bytes of a tensor, where an expanded dimension is stored once."""
    strided = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(strided) * tensor.element_size()


@contextmanager
def _one_rank_of(traffic: Traffic) -> Iterator[None]:
    """Makes the loss see a shard of the vocabulary, without other ranks."""
    size = traffic.size
    group: Any = object() if size.tensor > 1 else None
    shard = VocabShard(group, size.tensor, 0, 0, size.width)
    with (
        mock.patch.object(VocabShard, "of", classmethod(lambda *_: shard)),
        mock.patch.object(vocab_shard, "_ALL_GATHER", traffic.collective),
        mock.patch.object(dist, "all_reduce", traffic.collective),
        mock.patch.object(passes, "launch", traffic.launch),
    ):
        yield


def count(size: Size, objective: DistillationObjective, kernels: Any, chunk_tokens: int) -> Traffic:
    """Forward and backward of one call on bf16 tensors, with the fp32 buffer of Megatron's DDP."""
    traffic = Traffic(size)

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, head = tensor(size.tokens, size.student).requires_grad_(), tensor(size.width, size.student).requires_grad_()
    head.main_grad, head.grad_added_to_main_grad = tensor(size.width, size.student, dtype=torch.float32), False
    teacher = TeacherHidden(tensor(size.tokens, size.teacher), tensor(size.width, size.teacher))
    labels, mask = tensor(size.tokens, dtype=torch.int64), tensor(size.tokens, dtype=torch.float32)
    run: Callable[[], Any] = lambda: distillation_loss(  # noqa: E731
        hidden, head, teacher, labels, mask,
        objective=objective, vocab_size=size.vocab, group=None, chunk_tokens=chunk_tokens,
        kernels=kernels, into_main_grad=kernels == "triton",
    )  # fmt: skip
    with _one_rank_of(traffic), traffic:
        run().loss_sum.backward()
    return traffic


def rows(objective: DistillationObjective, sizes: tuple[Size, ...] = SIZES) -> Iterator[tuple[Size, str, int, Traffic]]:
    """(size, kernels, tokens of a chunk, counts)"""
    for size in sizes:
        default = derived.loss_chunk_tokens(False, size.width * 2)
        for kernels, chunk in (("eager", derived.loss_chunk_tokens(False)), ("eager", default), ("triton", default)):
            yield size, kernels, chunk, count(size, objective, kernels, chunk)


def bytes_an_entry(traffic: Traffic) -> float:
    """Of all passes over the logits."""
    return traffic.of_logits / (traffic.size.tokens * traffic.size.width)


def meets_targets(traffic: Traffic, divergence: str) -> bool:
    """Of a call with Triton kernels."""
    target = BYTES_TARGET + MORE_WITHOUT_CHAIN_RULE * (divergence in WITHOUT_CHAIN_RULE)
    return bytes_an_entry(traffic) <= target and traffic.of_head == 0 and traffic.kernels <= KERNELS_TARGET


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    objective = DistillationObjective(options.divergence, options.temperature)
    first = SIZES[0]
    print(f"{first.tokens} tokens, student {first.student}, teacher {first.teacher}, bf16, {objective.divergence}")
    columns = ["vocabulary, TP", "passes", "chunk", "TFLOP", "calls", "kernels", "bytes an entry", "GB over the head"]
    print(f"| {' | '.join([*columns, 'collectives'])} |\n|{'---|' * (len(columns) + 1)}")
    missed = False
    for size, kernels, chunk, found in rows(objective):
        collectives = f"{found.collectives}, {found.sent / 1e6:.1f} MB"
        numbers = [f"{size.vocab}, {size.tensor}", kernels, f"{chunk}", f"{found.flops / 1e12:.1f}", f"{found.calls}"]
        numbers += [f"{found.kernels}", f"{bytes_an_entry(found):.1f}", f"{found.of_head / 1e9:.1f}", collectives]
        print(f"| {' | '.join(numbers)} |")
        missed |= kernels == "triton" and not meets_targets(found, objective.divergence)
    print("a target is missed" if missed else "all targets are met")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
