"""One job, two worlds: the student's ranks and the teacher's own, each with process groups as if it were alone.

Megatron-Core and its checkpoints take the default process group for the whole world. So a teacher with ranks of its own
gets a default group of its own, and what passes between the two goes over a bridge outside of either.
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

# Whoever is ahead waits as long as the others work; a rank that is gone ends the wait at once, its connections close.
_NO_TIMEOUT = timedelta(days=365)
FAILED = 2**31 - 1
"""What a world says that has given up; above every signal's number and every step's."""
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
    """Work that may take so long."""

    work: Any
    limit: timedelta

    def wait(self) -> None:
        """Returns when it is done; raises after the limit."""
        self.work.wait(self.limit)


@dataclass(frozen=True)
class PendingMax:
    """A number that all ranks agree on, on its way."""

    _work: Any
    _number: Tensor
    _watchdog: Watchdog

    def wait(self) -> int:
        """The largest number that any rank has said, once all have; `FAILED` where a world has given up.

        Raises:
            RuntimeError: a rank is gone, or has noticed that another is.
        """
        self._watchdog.set_waiting_for("the word of all ranks on the end of a step")
        while not self._done():
            if self._watchdog.diagnosis:
                raise RuntimeError(self._watchdog.diagnosis)
        self._watchdog.set_waiting_for("")
        return int(self._number)

    def _done(self) -> bool:
        """Whether all ranks have said theirs; looks for a while."""
        try:
            self._work.wait(_POLL_INTERVAL)
        except RuntimeError:
            if self._work.is_completed():
                raise
            return False
        return True


class RoleGroups:
    """Opens the default process group of this rank's world, and the bridge between the two. Collective.

    Args:
        environment: this process among all of the job.
        device: decides the backends.
        teachers: the ranks of the teacher's world, the last ones; the others are the student's.
        timeout_seconds: how long a collective, or the student, may wait.

    Raises:
        UserError: the launcher's address is none.
    """

    def __init__(self, environment: Environment, device: Device, teachers: range, timeout_seconds: int) -> None:
        self.rank, world = environment.rank, environment.world
        self.is_teacher = self.rank in teachers
        self._limit = timedelta(seconds=timeout_seconds)
        url = f"tcp://{environment.master_addr}:{environment.master_port}"
        with report_rendezvous_problems(environment, timeout_seconds):
            self.store, _, _ = next(rendezvous(url, self.rank, world, timeout=self._limit))
        """Of all ranks of the job."""
        self.watchdog = Watchdog(self.store, self.rank, world, timeout_seconds)
        """Over all of them."""
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
        """Begins to send to and receive from ranks of the other world, numbered as in the job; a `handoff.Transport`.

        What is sent waits until it is taken; what is received must come within the time-out.
        """
        works = [_WorkWithTimeout(self._states.send([tensor], peer, 0), _NO_TIMEOUT) for tensor, peer in sends]
        return works + [
            _WorkWithTimeout(self._states.recv([tensor], peer, 0), self._limit) for tensor, peer in receives
        ]

    def start_all_reduce_max(self, number: int) -> PendingMax:
        """Says a number >= 0 to all ranks of both worlds. Collective, but nobody waits for anybody here."""
        value = torch.tensor(number, dtype=torch.int32)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]  # as torch's own calls; its stub has two types
        options.timeout = _NO_TIMEOUT
        return PendingMax(self._control.allreduce([value], options), value, self.watchdog)

    def abort_peers(self, error: UserError) -> None:
        """Tells all ranks why this world stops, in place of its next `agree`. Collective over this world."""
        self.store.set(_ERROR_KEY, str(error))
        with suppress(RuntimeError):  # an error of this rank alone: the others will notice that it is gone
            self.start_all_reduce_max(FAILED)._work.wait(self._limit)

    def barrier_with_errors(self, work: Callable[[], Result]) -> Result:
        """Both worlds do a work each, and go on when both are done. Collective.

        Raises:
            UserError: either's, on the ranks of both.
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
        """Why the other world has given up."""
        reason = ""
        with suppress(RuntimeError):  # the store may have gone with the first rank
            reason = self.store.get(_ERROR_KEY).decode() if self.store.check([_ERROR_KEY]) else ""
        return UserError(reason or "the ranks of the other model have given up")
