"""Hidden states on their way from the ranks of the teacher to those of the student, piece by piece as planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.distillation.transfer_plan import RowRange, TensorStream

States = dict[int, dict[int, Tensor]]
"""Hidden states `[rows, h_teacher]` by stream and sample, each sample contiguous in memory of its own."""


class TransferError(RuntimeError):
    """A transfer that did not come about: a rank is gone, or stalls."""


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> object:
        """Returns when it is done; raises where it cannot be."""


Transport = Callable[[Sequence[tuple[Tensor, int]], Sequence[tuple[Tensor, int]]], Sequence[Work]]
"""Begins to send and to receive contiguous tensors, each with the rank at the other end; gives the work of each in this
order. Between two ranks what is sent first is received first."""


def batched_p2p(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
    """The transport where teacher and student share all ranks."""
    operations = [dist.P2POp(dist.isend, tensor, peer) for tensor, peer in sends]
    operations += [dist.P2POp(dist.irecv, tensor, peer) for tensor, peer in receives]
    return dist.batch_isend_irecv(operations) if operations else []


@dataclass(frozen=True)
class PendingTransfer:
    """What one global batch's hand-off has begun on this rank."""

    states: States
    """What this rank needs; whole once `finish` has returned."""
    in_flight: list[tuple[Work, Tensor, str]]
    """Work, the memory that it reads or writes (gloo would go on reading it after it was freed), and what it is."""
    on_wait: Callable[[str], None]
    """Is told what this rank waits for: ranks that wait for this one have no other way to know."""

    def wait(self) -> States:
        """Waits for all of it.

        Raises:
            HandOffError: with the transfer that waited.
        """
        for work, _, what in self.in_flight:
            self.on_wait(what)
            try:
                work.wait()
            except RuntimeError as error:
                raise _transfer_error(what, error) from error
        self.on_wait("")
        self.in_flight.clear()
        return self.states


class HiddenStateTransfer:
    """The hand-off of a run, as far as it is this rank's.

    Args:
        streams: this rank's part of the plan.
        rank: its number, as the plan counts.
        width: of the teacher's hidden states.
        dtype: their type.
        device: where they live.
        transport: how they travel.
        say: is told which transfer this rank waits for, and "" when it waits no more.
    """

    def __init__(
        self,
        streams: Sequence[TensorStream],
        rank: int,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        transport: Transport,
        say: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.streams, self.rank = streams, rank
        self._width, self._dtype, self._device = width, dtype, device
        self._transport, self._say = transport, say

    def start(self, held: Mapping[int, Mapping[int, Tensor]], first_sample: int) -> PendingTransfer:
        """Begins to give and to take the states of one global batch. All ranks of the plan do so.

        Args:
            held: what the teacher has left on this rank, whole `[rows, h_teacher]`, contiguous; nothing where it left
                nothing.
            first_sample: number of the global batch's first sample.

        Raises:
            HandOffError: a rank at another end has gone before.
        """
        states: States = {}
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        names: tuple[list[str], list[str]] = ([], [])
        for stream in self.streams:
            mine = held.get(stream.key, {})
            states[stream.key] = self._recv_buffer(stream, mine, first_sample)
            for piece in stream.row_ranges:
                sample = piece.sample + first_sample
                if piece.source == self.rank:
                    assert stream.held is not None, "a rank gives of what it holds"
                    given = _rows(mine[sample], piece, stream.held.start)
                if piece.target == self.rank:
                    assert stream.needed is not None, "a rank takes of what it needs"
                    taken = _rows(states[stream.key][sample], piece, stream.needed.start)
                if piece.source != self.rank:
                    receives.append((taken, piece.source))
                    names[1].append(_name(stream, piece, sample))
                elif piece.target != self.rank:
                    sends.append((given, piece.target))
                    names[0].append(_name(stream, piece, sample))
                elif taken.data_ptr() != given.data_ptr():
                    taken.copy_(given)
        descriptions = [*names[0], *names[1]]
        try:
            works = self._transport(sends, receives)
        except RuntimeError as error:
            first, *rest = descriptions
            what = f"{first} or one of {len(rest)} more" if rest else first
            self._say(what)
            raise _transfer_error(what, error) from error
        tensors = [tensor for tensor, _ in (*sends, *receives)]
        return PendingTransfer(states, list(zip(works, tensors, descriptions, strict=True)), self._say)

    def _recv_buffer(self, stream: TensorStream, held: Mapping[int, Tensor], first_sample: int) -> dict[int, Tensor]:
        """Memory for what this rank needs of a stream: new, or the teacher's own where that is all of it."""
        need, have = stream.needed, stream.held
        if need is None:
            return {}
        same_rows = have is not None and (have.start, have.stop) == (need.start, need.stop)
        shape = (need.stop - need.start, self._width)
        return {
            sample: held[sample]
            if same_rows and sample in held
            else torch.empty(shape, dtype=self._dtype, device=self._device)
            for sample in (position + first_sample for position in need.samples)
        }


class TeacherStates:
    """What reached this rank of a global batch's hidden states.

    Args:
        states: by stream and sample.
    """

    def __init__(self, states: States) -> None:
        self._states = states

    def pop(self, key: int, samples: Sequence[int]) -> Tensor:
        """Hands out a micro-batch of one stream `[rows, b, h_teacher]`, and forgets it.

        Args:
            key: `FINAL` or the number of a teacher's layer.
            samples: the micro-batch's sample ids.
        """
        return torch.stack([self._states[key].pop(sample) for sample in samples], dim=1)


def split_by_sample(hidden: Tensor, samples: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """A micro-batch's states `[rows, b, h]` by sample, each in memory of its own, so that it can go on its own."""
    return ((sample, hidden[:, index].contiguous()) for index, sample in enumerate(samples))


def _rows(states: Tensor, piece: RowRange, start: int) -> Tensor:
    """The piece's rows of one sample's states, which begin with row `start`."""
    return states[piece.start - start : piece.stop - start]


def _name(stream: TensorStream, piece: RowRange, sample: int) -> str:
    output = f"layer {stream.key}" if stream.key else "the last layer"
    rows = f"rows {piece.start} to {piece.stop - 1} of sample {sample}"
    return f"the transfer of the teacher's hidden states behind {output} from rank {piece.source} to rank " + (
        f"{piece.target} ({rows})"
    )


def _transfer_error(what: str, error: RuntimeError) -> TransferError:
    said = str(error).strip()
    return TransferError(f"{what} waited in vain: {said.splitlines()[0] if said else type(error).__name__}")
