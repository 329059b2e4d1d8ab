"""Disjoint placement: the teacher's ranks work ahead of the student's ranks, and both agree on the end of each step.

The teacher starts at most `ahead` global batches that the student has not received. At the end the student receives
all that were started, because process groups with pending work cannot be destroyed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megatron_capgap.common.errors import UserError
from megatron_capgap.distillation.transfer import HiddenStateTransfer, PendingTransfer, TeacherStates
from megatron_capgap.distributed.role_groups import PendingMax, RoleGroups


def run_teacher_ahead(
    steps: range, ahead: int, run_teacher_step: Callable[[int], PendingTransfer], agree: Callable[[], PendingMax]
) -> int:
    """Runs the teacher over one global batch after the other. Collective over the teacher's ranks.

    A batch starts when the student has received the one `ahead` batches before it: while the student trains on batch n,
    batches up to n + `ahead` are computed, and at most `ahead` of them are stored on this rank.

    Args:
        steps: the student's steps, counted from 0.
        ahead: maximum number of global batches the teacher is ahead.
        run_teacher_step: runs the teacher over the batch of a step, and starts to send its hidden states.
        agree: starts the all-reduce at the end of a step, without waiting for it.

    Returns:
        0 when all steps are done, otherwise the code that ended the run. No work is pending then, provided that the
        student also completes the transfers and all-reduces that were started: those of the next `ahead` steps, or of
        the steps that were left.
    """
    sending: deque[PendingTransfer] = deque()
    agreements: deque[PendingMax] = deque()
    for step in steps:
        if len(agreements) > ahead and (end := agreements.popleft().wait()):
            return _drain(end, sending, agreements)
        if len(sending) == ahead:
            sending.popleft().wait()
        sending.append(run_teacher_step(step))
        agreements.append(agree())
    while agreements:
        if end := agreements.popleft().wait():
            return _drain(end, sending, agreements)
    return _drain(0, sending, agreements)


def _drain(end: int, sending: deque[PendingTransfer], agreements: deque[PendingMax]) -> int:
    """Waits for all pending work: process groups with pending work cannot be destroyed."""
    for transfer in sending:
        transfer.wait()
    for agreement in agreements:
        agreement.wait()
    return end


class StudentPeer:
    """The student's side: receives the teacher's hidden states, and agrees with its ranks on the end of each step.

    Args:
        roles: process groups of both roles.
        transfer: this rank's part of the transfer.
        batch_size: samples of a global batch.
        steps: of the whole run.
        ahead: maximum number of global batches the teacher is ahead.
    """

    def __init__(
        self, roles: RoleGroups, transfer: HiddenStateTransfer, *, batch_size: int, steps: int, ahead: int
    ) -> None:
        self._roles, self._transfer, self._batch_size = roles, transfer, batch_size
        self._steps, self._ahead = steps, ahead
        self._received = self._agreed = 0

    def start(self, done: int) -> None:
        """Agrees with the teacher's ranks on the number of steps done. Collective over both roles."""
        self._received = self._agreed = done
        self._roles.start_all_reduce_max(done).wait()

    def receive_teacher_states(self, first_sample: int) -> TeacherStates:
        """Receives the teacher's states of the global batch that starts with sample `first_sample`."""
        self._received = first_sample // self._batch_size + 1
        return TeacherStates(self._transfer.start({}, first_sample).wait())

    def all_reduce_max(self, number: int) -> int:
        """Maximum of a number over the ranks of both roles, once per step. Collective."""
        self._agreed += 1
        return self._roles.start_all_reduce_max(number).wait()

    def abort(self, error: UserError) -> None:
        """Sends the teacher's ranks the error for which the student stops, in place of the end of a step."""
        self._agreed += 1
        self._roles.abort_peers(error)

    def drain(self) -> None:
        """Receives all transfers that the teacher has started."""
        for step in range(self._received, min(self._agreed + self._ahead, self._steps)):
            self.receive_teacher_states(step * self._batch_size)
        for _ in range(self._agreed, min(self._agreed + self._ahead, self._steps)):
            self._roles.start_all_reduce_max(0).wait()
