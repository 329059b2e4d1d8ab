"""Teacher and student on the same ranks, one of which dies or sleeps while hidden states are handed over."""

import os
import signal
import time
from datetime import timedelta

import psutil
import pytest
import torch

from megatron_capgap.config.schema import Config, DataConfig, Layout, StudentConfig, TeacherConfig
from megatron_capgap.config.training import TrainConfig
from tests.support.pool import WorkerError, WorkerPool
from tests.support.processes import LEAVE, wait_for

LIMIT = 5.0  # seconds that a transfer waits, and a rank for the others to begin


def hand_over_without(lost: int, how: str) -> tuple[str, float] | None:
    """Runs in a worker: hands over from the last of four stages to four copies while one rank dies or sleeps.

    Returns:
        What stopped this rank and after how many seconds; None where nothing did.
    """
    import torch.distributed as dist

    from megatron_capgap.distillation import transfer_plan
    from megatron_capgap.distillation.transfer import HiddenStateTransfer, TransferError, batched_p2p
    from megatron_capgap.distillation.transfer_plan import FINAL_HIDDEN, StageRoute

    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    rank = dist.get_rank()
    data, train = DataConfig("tokenizer", sequence_length=12), TrainConfig(global_batch=8, micro_batch=2)
    teacher = TeacherConfig("teacher", layout=Layout(pipeline=4), micro_batch=1)
    sides = transfer_plan.model_placements(
        Config("run", StudentConfig(layout=Layout()), data, teacher=teacher, train=train), 4
    )
    (stream,) = transfer_plan.streams(*sides, [StageRoute(FINAL_HIDDEN, 3, (0,))], rank)
    kind = {"dtype": torch.float32, "device": torch.device("cpu")}
    hand_off = HiddenStateTransfer([stream], rank, width=5, transport=batched_p2p, **kind)
    held = {k: torch.zeros(12, 5) for k in stream.held.samples} if stream.held else {}
    hand_off.start({FINAL_HIDDEN: held}, 0).wait()  # every connection has been used
    pids: list[int] = [0] * 4
    dist.all_gather_object(pids, os.getpid())
    pid = pids[lost]
    began = time.monotonic()
    if rank == lost and "dead" in how:
        os.kill(os.getpid(), signal.SIGKILL)
    elif rank == lost:
        time.sleep(2 * LIMIT)
        return None
    elif how == "long dead":  # its connections are closed when the transfer begins
        wait_for(lambda: not psutil.pid_exists(pid), 60, "the end of the lost rank")
    try:
        hand_off.start({FINAL_HIDDEN: held}, 0).wait()
    except TransferError as error:
        return str(error), time.monotonic() - began
    return None


def assert_named(said: str, source: int, target: int) -> None:
    name = (
        f"the transfer of the teacher's hidden states after the last layer from rank {source} to rank {target} (rows "
    )
    assert name in said and "failed: " in said, said


def test_a_rank_that_stalls_in_a_colocated_hand_off(pool: WorkerPool) -> None:
    """Whoever waits for it says for which transfer, within the time-out; whoever does not goes on."""
    for lost, waiting in ((3, (0, 1, 2)), (0, (3,))):
        ranks = pool.run(hand_over_without, lost, "stalled", world=4, initialise=False)
        assert [rank for rank, found in enumerate(ranks) if found] == list(waiting)
        for rank in waiting:
            said, seconds = ranks[rank]
            assert_named(said, 3, rank if lost == 3 else 0)
            assert seconds < LIMIT + LEAVE, "and the time that a loaded machine takes to say so"


@pytest.mark.parametrize("how", ["dead", "long dead"])
def test_a_rank_that_dies_in_a_colocated_hand_off(pool: WorkerPool, how: str) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerError) as failed:
        pool.run(stop_where_it_waits, 3, how, world=4, initialise=False)
    assert time.monotonic() - began < 120
    failures = failed.value.failures
    assert sorted(failures) == [0, 1, 2, 3] and "exit code -9" in failures[3].reason
    for rank in range(3):
        assert_named(failures[rank].reason, 3, rank)


def stop_where_it_waits(lost: int, how: str) -> None:
    """Runs in a worker: as `hand_over_without` a rank that dies, with an error where that is told."""
    if found := hand_over_without(lost, how):
        raise RuntimeError(found[0])
