"""Collectives of Python objects: a `UserError` on one rank is raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from megatron_capgap.common.errors import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Result = TypeVar("Result")


def run_on_rank0(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `work` on rank 0 and broadcasts its result to all ranks. Collective.

    Args:
        work: returns a picklable object. If it raises a `UserError`, every rank raises it.
        group: group of all ranks, if the default group is in use.
    """
    import torch.distributed as dist

    outcome = [_catch_user_error(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0, group=group)
    assert outcome[0] is not None, "rank 0 has sent its own"
    error, answer = outcome[0]
    if error is not None:
        raise error
    return cast("Result", answer)


def gather_from_ranks(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """Runs `work` on every rank and gathers all results on all ranks. Collective.

    If `work` raises a `UserError` on any rank, every rank raises the first one.

    Args:
        work: returns a picklable object.
        group: group of all ranks, if the default group is in use.
    """
    import torch.distributed as dist

    outcomes: list[tuple[UserError | None, Result | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, _catch_user_error(work), group=group)
    for error, _ in outcomes:
        if error is not None:
            raise error
    return [cast("Result", answer) for _, answer in outcomes]


def run_on_all_ranks(work: Callable[[], Result]) -> Result:
    """Runs `work` on every rank; each rank gets its own result. Collective.

    If `work` raises a `UserError` on any rank, for example because of its local disk, every rank raises it, as in
    `gather_from_ranks`.
    """
    answers: list[Result] = []
    gather_from_ranks(lambda: answers.append(work()))
    return answers[0]


def _catch_user_error(work: Callable[[], Result]) -> tuple[UserError | None, Result | None]:
    try:
        return None, work()
    except UserError as error:
        return error, None
    except OSError as error:  # a full or broken disk: other ranks must not wait for a result
        name, what = error.filename or "file system", error.strerror or error
        return UserError(f"{name}: {what}; free space or repair the disk, then start again"), None


def all_reduce_max(number: int, device: torch.device) -> int:
    """Maximum of a number over the ranks of the default process group. Collective.

    Args:
        number: this rank's number.
        device: device of the group's tensors.
    """
    import torch
    import torch.distributed as dist

    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
