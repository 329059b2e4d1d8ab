"""Transfers hidden states from the teacher's ranks to the student's ranks, as `transfer_plan` prescribes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.distillation.transfer_plan import RankSlice, RowRange, TensorStream

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
        on_wait: called with the transfer that this rank waits for, and with "" when it no longer waits.
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
        on_wait: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.streams, self.rank = streams, rank
        self._width, self._dtype, self._device = width, dtype, device
        self._transport, self._on_wait = transport, on_wait

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
            for row_range in stream.row_ranges:
                sample = row_range.sample + first_sample
                if row_range.source == self.rank:
                    assert stream.held is not None, "a rank gives of what it holds"
                    source_rows = _rows(mine[sample], row_range, stream.held)
                if row_range.target == self.rank:
                    assert stream.needed is not None, "a rank takes of what it needs"
                    target_rows = _rows(states[stream.key][sample], row_range, stream.needed)
                if row_range.source != self.rank:
                    receives.append((target_rows, row_range.source))
                    names[1].append(_name(stream, row_range, sample))
                elif row_range.target != self.rank:
                    sends.append((source_rows, row_range.target))
                    names[0].append(_name(stream, row_range, sample))
                elif target_rows.data_ptr() != source_rows.data_ptr():
                    target_rows.copy_(source_rows)
        descriptions = [*names[0], *names[1]]
        try:
            works = self._transport(sends, receives)
        except RuntimeError as error:
            first, *rest = descriptions
            what = f"{first} or one of {len(rest)} more" if rest else first
            self._on_wait(what)
            raise _transfer_error(what, error) from error
        tensors = [tensor for tensor, _ in (*sends, *receives)]
        return PendingTransfer(states, list(zip(works, tensors, descriptions, strict=True)), self._on_wait)

    def _recv_buffer(self, stream: TensorStream, held: Mapping[int, Tensor], first_sample: int) -> dict[int, Tensor]:
        """Receive buffer for the rows of a stream that this rank needs: new, or the teacher's own tensor if it already
        holds all of them."""
        need, have = stream.needed, stream.held
        if need is None:
            return {}
        same_rows = have is not None and have.spans == need.spans
        shape = (need.rows, self._width)
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
            key: `FINAL_HIDDEN` or the number of the teacher's layer.
            samples: the micro-batch's sample ids.
        """
        return torch.stack([self._states[key].pop(sample) for sample in samples], dim=1)


def split_by_sample(hidden: Tensor, samples: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """A micro-batch's states `[rows, b, h]` by sample, each in its own memory, so that it can be freed separately."""
    return ((sample, hidden[:, index].contiguous()) for index, sample in enumerate(samples))


def _rows(states: Tensor, row_range: RowRange, held: RankSlice) -> Tensor:
    """The rows `row_range` of one sample's states, which are the rows of `held`."""
    return states[(first := held.place(row_range.start)) : first + row_range.rows]


def _name(stream: TensorStream, row_range: RowRange, sample: int) -> str:
    output = f"layer {stream.key}" if stream.key else "the last layer"
    rows = f"rows {row_range.start} to {row_range.stop - 1} of sample {sample}"
    return f"the transfer of the teacher's hidden states after {output} from rank {row_range.source} to rank " + (
        f"{row_range.target} ({rows})"
    )


def _transfer_error(what: str, error: RuntimeError) -> TransferError:
    text = str(error).strip()
    return TransferError(f"{what} failed: {text.splitlines()[0] if text else type(error).__name__}")
