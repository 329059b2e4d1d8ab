"""The pool that all other distributed tests stand on."""

import os
import sys
import time
from typing import Any

import pytest
import torch

from tests.support.pool import WorkerError, WorkerPool


def sum_of_ranks(offset: int) -> tuple[int, int, float]:
    total = torch.tensor([float(torch.distributed.get_rank() + offset)])
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), total.item()


def raise_on(rank: int) -> None:
    print("before the error")
    if int(os.environ["RANK"]) == rank:
        raise ValueError(f"rank {rank} is unhappy")
    torch.distributed.barrier()


def hang_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        print("about to sleep")
        time.sleep(60)


def die_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os._exit(7)


def echo(value: int) -> int:
    return value


def make_own_group() -> int:
    assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()  # rank 0 holds the store: it may not leave while another rank still connects
    print("out", os.environ["RANK"])
    os.system("echo err from a child process >&2")
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    return torch.distributed.get_world_size()


def look_around() -> tuple[bool, str, str]:
    return torch.distributed.is_initialized(), os.environ.get("LEFT_BEHIND", ""), os.getcwd()


def leave_megatron_groups() -> int:
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    return parallel_state.get_tensor_model_parallel_world_size()


def exit_with(code: int) -> None:
    print("usage: ...", file=sys.stderr)
    sys.exit(code)


def random_number() -> float:
    return torch.rand(()).item()


def test_worlds_of_changing_size(pool: WorkerPool) -> None:
    for world in (1, 2, 4, 1, 2):
        results = pool.run(sum_of_ranks, 10, world=world)
        total = float(sum(range(world)) + 10 * world)
        assert results == [(rank, world, total) for rank in range(world)]


def test_tensors_travel_by_value(pool: WorkerPool) -> None:
    assert pool.run(torch.add, torch.ones(2), torch.ones(2), world=1)[0].tolist() == [2, 2]


def test_every_failing_rank_is_reported(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 1 is unhappy") as caught:
        pool.run(raise_on, 1)
    assert set(caught.value.failures) == {0, 1}  # rank 0 waited in the barrier for a peer that had gone
    assert "before the error" in caught.value.failures[1].stdout
    assert pool.run(sum_of_ranks, 0)[0][2] == 1.0


def test_a_hanging_rank_is_named_and_replaced(pool: WorkerPool) -> None:
    pool.run(look_around, initialise=False)  # the limit is short: no worker may have to start first
    with pytest.raises(WorkerError, match=r"no answer after 5\.") as caught:
        pool.run(hang_on, 1, limit=5.0, initialise=False)
    assert set(caught.value.failures) == {1}
    assert "about to sleep" in caught.value.failures[1].stdout
    assert "in hang_on" in caught.value.failures[1].stderr, "the stacks of all its threads"
    assert "torch's seed at the start: 0" in str(caught.value)
    assert pool.run(sum_of_ranks, 0)[0][2] == 1.0


def test_a_test_that_gives_up_gets_no_old_answers(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pytest-timeout raises comes while the pool waits."""

    def give_up(*_: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(pool, "_collect", give_up)
    with pytest.raises(TimeoutError):
        pool.run(echo, 1, initialise=False)
    monkeypatch.undo()
    assert pool.run(echo, 2, initialise=False) == [2, 2]


def test_a_dying_rank_is_named_and_replaced(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="died with exit code 7"):
        pool.run(die_on, 0)
    assert pool.run(sum_of_ranks, 0)[0][2] == 1.0


def test_the_function_may_make_its_own_group(pool: WorkerPool) -> None:
    results = pool.run(make_own_group, world=2, initialise=False, capture=True)
    assert [result.value for result in results] == [2, 2]
    assert [result.stdout for result in results] == ["out 0\n", "out 1\n"]
    assert all("err from a child process" in result.stderr for result in results)
    assert pool.run(look_around, world=2, initialise=False) == [(False, "", os.getcwd())] * 2


def test_nothing_of_megatron_outlives_a_call(pool: WorkerPool) -> None:
    assert pool.run(leave_megatron_groups, world=2) == [2, 2]
    assert pool.run(leave_megatron_groups, world=1) == [1]


def test_the_exit_of_a_command_is_a_failure_with_its_output(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="SystemExit: 2") as caught:
        pool.run(exit_with, 2, world=1, initialise=False)
    assert caught.value.failures[0].stderr == "usage: ...\n"


def test_every_call_starts_from_the_same_seed(pool: WorkerPool) -> None:
    first, second = pool.run(random_number, world=2), pool.run(random_number, world=2)
    assert first == second and first[0] == first[1]
