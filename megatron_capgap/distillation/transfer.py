"""Transfers hidden states from the teacher's ranks to the student's ranks, as `transfer_plan` prescribes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.distillation.transfer_plan import RowRange, TensorStream

States = dict[int, dict[int, Tensor]]
"""Hidden states `[rows, h_teacher]` by stream and sample, each sample in its own contiguous memory."""


class TransferError(RuntimeError):
    """A failed transfer: a rank has died or stalls."""


class Work(Protocol):
    """A pending transfer."""

    def wait(self) -> object:
        """Blocks until it is done; raises if it fails."""


Transport = Callable[[Sequence[tuple[Tensor, int]], Sequence[tuple[Tensor, int]]], Sequence[Work]]
"""Starts to send and to receive contiguous tensors, each paired with the peer rank. Returns the work of each in this
order: sends, then receives. Between two ranks the order of sends and receives must match."""


def batched_p2p(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
    """The transport for colocated placement, where teacher and student share all ranks."""
    operations = [dist.P2POp(dist.isend, tensor, peer) for tensor, peer in sends]
    operations += [dist.P2POp(dist.irecv, tensor, peer) for tensor, peer in receives]
    return dist.batch_isend_irecv(operations) if operations else []


@dataclass(frozen=True)
class PendingTransfer:
    """The pending transfer of one global batch on this rank."""

    states: States
    """The states that this rank needs; complete after `wait`."""
    in_flight: list[tuple[Work, Tensor, str]]
    """For each transfer: its work, the memory it reads or writes (kept alive, because gloo still accesses it), its
    name."""
    on_wait: Callable[[str], None]
    """Called with the transfer that this rank waits for, so that ranks waiting for this one can report it."""

    def wait(self) -> States:
        """Waits for all transfers of the batch.

        Raises:
            TransferError: names the transfer that failed.
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
    """This rank's part of a run's hidden-state transfer.

    Args:
        streams: this rank's part of the plan.
        rank: this rank's number in the plan.
        width: the teacher's hidden size.
        dtype: dtype of the hidden states.
        device: their device.
        transport: starts sends and receives.
        say: called with the transfer that this rank waits for, and with "" when it no longer waits.
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
        """Starts to send and receive the states of one global batch. Collective over all ranks of the plan.

        Args:
            held: the teacher's states on this rank, by stream and sample, complete `[rows, h_teacher]`, contiguous;
                empty on a rank without the teacher.
            first_sample: number of the global batch's first sample.

        Raises:
            TransferError: a peer rank has died.
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
        """Receive buffer for the rows of a stream that this rank needs: new, or the teacher's own tensor if it already
        holds all of them."""
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
    """The teacher's hidden states of a global batch on this rank.

    Args:
        states: by stream and sample.
    """

    def __init__(self, states: States) -> None:
        self._states = states

    def pop(self, key: int, samples: Sequence[int]) -> Tensor:
        """Removes and returns one stream's states of a micro-batch, `[rows, b, h_teacher]`.

        Args:
            key: `FINAL` or the number of the teacher's layer.
            samples: the micro-batch's sample ids.
        """
        return torch.stack([self._states[key].pop(sample) for sample in samples], dim=1)


def split_by_sample(hidden: Tensor, samples: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """A micro-batch's states `[rows, b, h]` by sample, each in its own memory, so that it can be freed separately."""
    return ((sample, hidden[:, index].contiguous()) for index, sample in enumerate(samples))


def _rows(states: Tensor, piece: RowRange, start: int) -> Tensor:
    """The rows `piece` of one sample's states, whose first row is number `start`."""
    return states[piece.start - start : piece.stop - start]


def _name(stream: TensorStream, piece: RowRange, sample: int) -> str:
    output = f"layer {stream.key}" if stream.key else "the last layer"
    rows = f"rows {piece.start} to {piece.stop - 1} of sample {sample}"
    return f"the transfer of the teacher's hidden states after {output} from rank {piece.source} to rank " + (
        f"{piece.target} ({rows})"
    )


def _transfer_error(what: str, error: RuntimeError) -> TransferError:
    said = str(error).strip()
    return TransferError(f"{what} failed: {said.splitlines()[0] if said else type(error).__name__}")
