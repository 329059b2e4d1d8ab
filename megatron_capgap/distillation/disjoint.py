"""A teacher on ranks of its own: how its ranks work ahead of the student's, and how the student's ranks keep step.

The teacher starts at most `ahead` global batches that the student has not taken; at the end the student takes them all,
since process groups with open work would not close.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megatron_capgap.common.errors import UserError
from megatron_capgap.distillation.transfer import HiddenStateTransfer, PendingTransfer, TeacherStates
from megatron_capgap.distributed.role_groups import PendingMax, RoleGroups


def run_teacher_ahead(
    steps: range, ahead: int, teach: Callable[[int], PendingTransfer], agree: Callable[[], PendingMax]
) -> int:
    """Teaches one global batch after the other. Collective over the teacher's ranks.

    A batch is begun when the student has taken the one `ahead` before it: while the student works on batch n, those up
    to n + `ahead` are made, and at most `ahead` of them are on this rank.

    Args:
        steps: the student's, counted from 0.
        ahead: global batches.
        teach: runs the teacher over the batch of a step, and begins to send what it leaves.
        agree: takes part in the agreement at the end of a step, without waiting for it.

    Returns:
        0 when all steps are done, else what ended the run. Nothing is under way any more, if the student too takes the
        batches and agreements that were begun: for `ahead` steps after the last one, or as many as were left.
    """
    sending: deque[PendingTransfer] = deque()
    agreements: deque[PendingMax] = deque()
    for step in steps:
        if len(agreements) > ahead and (end := agreements.popleft().wait()):
            return _drain(end, sending, agreements)
        if len(sending) == ahead:
            sending.popleft().wait()
        sending.append(teach(step))
        agreements.append(agree())
    while agreements:
        if end := agreements.popleft().wait():
            return _drain(end, sending, agreements)
    return _drain(0, sending, agreements)


def _drain(end: int, sending: deque[PendingTransfer], agreements: deque[PendingMax]) -> int:
    """Waits for what is under way: process groups with open work would not close."""
    for transfer in sending:
        transfer.wait()
    for agreement in agreements:
        agreement.wait()
    return end


class StudentSide:
    """The student's ranks: they receive the teacher's hidden states, and agree with its ranks on the end of each step.

    Args:
        roles: process groups of both roles.
        transfer: this rank's part in the transfer.
        batch_size: samples of a global batch.
        steps: of the whole run.
        ahead: global batches that the teacher may be ahead.
    """

    def __init__(
        self, roles: RoleGroups, transfer: HiddenStateTransfer, *, batch_size: int, steps: int, ahead: int
    ) -> None:
        self._roles, self._transfer, self._batch_size = roles, transfer, batch_size
        self._steps, self._ahead = steps, ahead
        self._received = self._agreed = 0

    def start(self, done: int) -> None:
        """Tells the teacher's ranks from which step the run goes on. Collective over both roles."""
        self._received = self._agreed = done
        self._roles.start_all_reduce_max(done).wait()

    def teacher_forward(self, first_sample: int) -> TeacherStates:
        """Receives the teacher's states of the global batch that begins with this sample."""
        self._received = first_sample // self._batch_size + 1
        return TeacherStates(self._transfer.start({}, first_sample).wait())

    def all_reduce_max(self, number: int) -> int:
        """The largest of a number over the ranks of both roles, once a step."""
        self._agreed += 1
        return self._roles.start_all_reduce_max(number).wait()

    def abort(self, error: UserError) -> None:
        """Tells the teacher's ranks why the student stops, in place of the end of a step."""
        self._agreed += 1
        self._roles.abort_peers(error)

    def drain(self) -> None:
        """Takes what the teacher has begun."""
        for step in range(self._received, min(self._agreed + self._ahead, self._steps)):
            self.teacher_forward(step * self._batch_size)
        for _ in range(self._agreed, min(self._agreed + self._ahead, self._steps)):
            self._roles.start_all_reduce_max(0).wait()
