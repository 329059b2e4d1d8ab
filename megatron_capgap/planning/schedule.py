"""Times of pipeline schedules: a simulator, which benchmarks/teacher_layouts.py compares with Megatron's own schedules,
and its closed form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """One pass of a pipeline over the micro-batches of a step; times are of one micro-batch on one rank."""

    stages: int
    micro_batches: int
    forward: float
    backward: float = 0.0
    """Backward time; 0 for a teacher, which runs forward only."""
    virtual: int = 1
    """Chunks of layers per rank; each takes its share of the times."""
    width: int = 64
    """Hidden size of the activations that are sent, if stages sleep."""
    last: float = 0.0
    """Further time of each micro-batch on the last stage, before its backward pass: the loss."""

    def order(self, rank: int) -> list[tuple[str, int, int]]:
        """Operations of a rank in Megatron-Core's order: ("F" or "B", chunk, micro-batch)."""
        count, stages, virtual = self.micro_batches, self.stages, self.virtual
        forwards = [
            ("F", k % (stages * virtual) // stages, _micro_batch(k, stages, virtual)) for k in range(count * virtual)
        ]
        if not self.backward:
            return forwards
        if virtual == 1:
            warm = min(stages - 1 - rank, count)
        else:
            warm = min((stages - rank - 1) * 2 + (virtual - 1) * stages, count * virtual)
        backwards = [("B", virtual - 1 - chunk, micro_batch) for _, chunk, micro_batch in forwards]
        steady = [step for pair in zip(forwards[warm:], backwards, strict=False) for step in pair]
        return forwards[:warm] + steady + backwards[len(forwards) - warm :]

    def simulated(self) -> float:
        """Time at which the last rank is done: an operation starts when its rank is free and its input has arrived."""
        ends: dict[tuple[str, int, int, int], float] = {}
        queues = [iter(self.order(rank)) for rank in range(self.stages)]
        heads = [next(queue, None) for queue in queues]
        free = [0.0] * self.stages
        while any(heads):
            for rank, head in enumerate(heads):
                while head and all(needed in ends for needed in self._needs(rank, *head)):
                    kind, chunk, micro_batch = head
                    began = max([free[rank], *(ends[needed] for needed in self._needs(rank, *head))])
                    free[rank] = began + (self.forward if kind == "F" else self.backward) / self.virtual
                    if kind == "F" and rank == self.stages - 1 and chunk == self.virtual - 1:
                        free[rank] += self.last
                    ends[kind, chunk, micro_batch, rank] = free[rank]
                    head = heads[rank] = next(queues[rank], None)
        return max(free)

    @property
    def seconds(self) -> float:
        """As `simulated`, in closed form; exact without virtual stages, and without a loss."""
        fill = (self.stages - 1) / self.virtual * (self.forward + self.backward)
        return self.micro_batches * (self.forward + self.backward + self.last) + fill

    def _needs(self, rank: int, kind: str, chunk: int, micro_batch: int) -> Iterator[tuple[str, int, int, int]]:
        """The operations on other ranks or chunks that an operation waits for."""
        last = self.stages - 1
        if kind == "F" and (rank or chunk):
            yield ("F", chunk, micro_batch, rank - 1) if rank else ("F", chunk - 1, micro_batch, last)
        elif kind == "B" and (rank < last or chunk < self.virtual - 1):
            yield ("B", chunk, micro_batch, rank + 1) if rank < last else ("B", chunk + 1, micro_batch, 0)
        elif kind == "B":
            yield ("F", chunk, micro_batch, rank)


def _micro_batch(k: int, stages: int, virtual: int) -> int:
    """The micro-batch of a rank's k-th forward pass: each chunk processes `stages` of them in turn."""
    return k // (stages * virtual) * stages + k % stages if virtual > 1 else k
