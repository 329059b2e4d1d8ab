"""A teacher on ranks of its own: it works ahead of the student, by so many global batches and no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from megatron_capgap.distillation.transfer import PendingTransfer


class PendingMax(Protocol):
    """What all ranks agree on at the end of one of the student's steps."""

    def wait(self) -> int:
        """Returns when the step is done: 0 to go on, else what ends the run."""


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
