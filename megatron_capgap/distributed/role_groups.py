"""Process groups of a job with a disjoint teacher: student and teacher each have their own default group.

Megatron-Core and its checkpoints treat the default process group as the whole world, so each role gets its own.
Communication between the roles uses separate groups over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from megatron_capgap.common.errors import UserError
from megatron_capgap.devices import Device
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.distributed.rendezvous import report_rendezvous_problems
from megatron_capgap.distributed.watchdog import Watchdog

Result = TypeVar("Result")

# A role that is ahead waits while the other works; a dead rank ends the wait at once, because its connections close.
_NO_TIMEOUT = timedelta(days=365)
FAILED = 2**31 - 1
"""Value that a role reports after an error; larger than every signal and step number."""
_POLL_INTERVAL = timedelta(seconds=1)
_ERROR_KEY = "reason"


class _Backend(Protocol):
    """What of gloo's and NCCL's process groups is used here: torch's stub does not say that they have it."""

    def send(self, tensors: list[Tensor], peer: int, tag: int, /) -> Any:
        """Begins to send."""

    def recv(self, tensors: list[Tensor], peer: int, tag: int, /) -> Any:
        """Begins to receive."""

    def allreduce(self, tensors: list[Tensor], options: dist.AllreduceOptions, /) -> Any:
        """Begins an all-reduce."""


@dataclass(frozen=True)
class _WorkWithTimeout:
    """Asynchronous work with a time-out."""

    work: Any
    limit: timedelta

    def wait(self) -> None:
        """Waits until the work is done; raises after the time-out."""
        self.work.wait(self.limit)


@dataclass(frozen=True)
class PendingMax:
    """An asynchronous max-all-reduce over the ranks of both roles."""

    _work: Any
    _number: Tensor
    _watchdog: Watchdog

    def wait(self) -> int:
        """Waits for all ranks and returns the maximum; `FAILED` if a role has reported an error.

        Raises:
            RuntimeError: a rank has failed, or another rank has reported a failed rank.
        """
        self._watchdog.set_waiting_for("the end-of-step all-reduce over all ranks")
        while not self._done():
            if self._watchdog.diagnosis:
                raise RuntimeError(self._watchdog.diagnosis)
        self._watchdog.set_waiting_for("")
        return int(self._number)

    def _done(self) -> bool:
        """Whether all ranks have contributed; waits for one polling interval."""
        try:
            self._work.wait(_POLL_INTERVAL)
        except RuntimeError:
            if self._work.is_completed():
                raise
            return False
        return True


class RoleGroups:
    """Creates the default process group of this rank's role, and the groups between the roles. Collective.

    Args:
        environment: this process among all of the job.
        device: determines the backends.
        teachers: the teacher's ranks, the last ones of the job; all others are the student's.
        timeout_seconds: time-out of a collective, and of the student's wait for the teacher, in seconds.

    Raises:
        UserError: the launcher's address is invalid.
    """

    def __init__(self, environment: Environment, device: Device, teachers: range, timeout_seconds: int) -> None:
        self.rank, world = environment.rank, environment.world
        self.is_teacher = self.rank in teachers
        self._limit = timedelta(seconds=timeout_seconds)
        url = f"tcp://{environment.master_addr}:{environment.master_port}"
        with report_rendezvous_problems(environment, timeout_seconds):
            self.store, _, _ = next(rendezvous(url, self.rank, world, timeout=self._limit))
        """Store of all ranks of the job."""
        self.watchdog = Watchdog(self.store, self.rank, world, timeout_seconds)
        """Watchdog over all ranks of the job."""
        self.store.set_timeout(self._limit)
        name, first, size = (
            ("teacher", teachers.start, len(teachers)) if self.is_teacher else ("student", 0, teachers[0])
        )
        dist.init_process_group(
            device.backend,
            store=dist.PrefixStore(name, self.store),
            rank=self.rank - first,
            world_size=size,
            timeout=self._limit,
        )
        self._control: _Backend = dist.ProcessGroupGloo(  # type: ignore[assignment]
            dist.PrefixStore("control", self.store), self.rank, world, self._limit
        )
        self._states = self._control
        if device.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _NO_TIMEOUT
            store = dist.PrefixStore("states", self.store)
            self._states = dist.ProcessGroupNCCL(store, self.rank, world, options)  # type: ignore[assignment]

    def start_send_recv(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[Any]:
        """Starts sends to and receives from ranks of the other role, by job rank; a `transfer.Transport`.

        Sends wait without a time-out until they are received; receives have the time-out.
        """
        works = [_WorkWithTimeout(self._states.send([tensor], peer, 0), _NO_TIMEOUT) for tensor, peer in sends]
        return works + [
            _WorkWithTimeout(self._states.recv([tensor], peer, 0), self._limit) for tensor, peer in receives
        ]

    def start_all_reduce_max(self, number: int) -> PendingMax:
        """Starts a max-all-reduce of a number >= 0 over the ranks of both roles. Collective, does not block."""
        value = torch.tensor(number, dtype=torch.int32)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]  # as torch's own calls; its stub has two types
        options.timeout = _NO_TIMEOUT
        return PendingMax(self._control.allreduce([value], options), value, self.watchdog)

    def abort_peers(self, error: UserError) -> None:
        """Reports an error of this role to all ranks, in place of its next `start_all_reduce_max`. Collective over this
        role."""
        self.store.set(_ERROR_KEY, str(error))
        with suppress(RuntimeError):  # an error of this rank only: other ranks detect its exit
            self.start_all_reduce_max(FAILED)._work.wait(self._limit)

    def barrier_with_errors(self, work: Callable[[], Result]) -> Result:
        """Runs `work` in both roles and waits until both are done. Collective.

        Raises:
            UserError: error of either role, on the ranks of both.
        """
        try:
            answer = work()
        except UserError as error:
            self.abort_peers(error)
            raise
        if self.start_all_reduce_max(0).wait() == FAILED:
            raise self.peer_error()
        return answer

    def peer_error(self) -> UserError:
        """The error that the other role has reported."""
        reason = ""
        with suppress(RuntimeError):  # the store ends with rank 0
            reason = self.store.get(_ERROR_KEY).decode() if self.store.check([_ERROR_KEY]) else ""
        return UserError(reason or "the ranks of the other model have failed")
