"""Python objects and errors between ranks: a `UserError` of one rank is raised on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from megatron_capgap.common.errors import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Result = TypeVar("Result")


def run_on_rank0(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `work` on rank 0 while the others wait, and gives its answer to all of them. Collective.

    Args:
        work: returns something that can be pickled. A `UserError` it raises is raised on every rank.
        group: of all ranks, where the default one is busy with something else.
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
    """Does each rank's own work and gives all answers to all ranks. Collective.

    What fails on one rank fails on all, before they wait for each other: the first `UserError` is raised on every rank.

    Args:
        work: returns something that can be pickled.
        group: of all ranks, where the default one is busy with something else.
    """
    import torch.distributed as dist

    outcomes: list[tuple[UserError | None, Result | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, _catch_user_error(work), group=group)
    for error, _ in outcomes:
        if error is not None:
            raise error
    return [cast("Result", answer) for _, answer in outcomes]


def run_on_all_ranks(work: Callable[[], Result]) -> Result:
    """Does the same work on every rank, and gives each its own answer. Collective.

    What fails on one rank, whose disk is not that of the others, fails on all: as `on_every_rank`.
    """
    answers: list[Result] = []
    gather_from_ranks(lambda: answers.append(work()))
    return answers[0]


def _catch_user_error(work: Callable[[], Result]) -> tuple[UserError | None, Result | None]:
    try:
        return None, work()
    except UserError as error:
        return error, None
    except OSError as error:  # a full or broken disk: the others must not wait for an answer
        name, what = error.filename or "file system", error.strerror or error
        return UserError(f"{name}: {what}; free space or mend it, then start again"), None


def all_reduce_max(number: int, device: torch.device) -> int:
    """The largest of a number over the ranks of the default process group. Collective.

    Args:
        number: this rank's.
        device: where the group's tensors live.
    """
    import torch
    import torch.distributed as dist

    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
