"""The benchmark's simulator of pipeline schedules, against closed forms."""

import importlib.util
import sys

import pytest

from tests.support.processes import ROOT


@pytest.fixture(scope="module")
def simulator():
    """The benchmark as a module."""
    path = ROOT / "benchmarks" / "teacher_layouts.py"
    specification = importlib.util.spec_from_file_location("teacher_layouts", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["teacher_layouts"] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stages, count", [(1, 3), (2, 2), (4, 8), (8, 8), (8, 5)])
def test_the_bubble_is_one_slot_for_each_further_stage(simulator, stages: int, count: int) -> None:
    slots = count + stages - 1
    assert simulator.Schedule(stages, count, 1.0, 2.0).simulated() == pytest.approx(3.0 * slots)
    assert simulator.Schedule(stages, count, 2.5).simulated() == pytest.approx(2.5 * slots)


@pytest.mark.parametrize("stages, count, virtual", [(2, 4, 2), (4, 8, 2), (4, 8, 4)])
def test_chunks_divide_the_bubble(simulator, stages: int, count: int, virtual: int) -> None:
    expected = 3.0 * (count + (stages - 1) / virtual)
    assert simulator.Schedule(stages, count, 1.0, 2.0, virtual=virtual).simulated() == pytest.approx(expected)


def test_every_rank_does_every_micro_batch_once(simulator) -> None:
    case = simulator.Schedule(4, 8, 1.0, 2.0, virtual=2)
    for rank in range(4):
        order = case.order(rank)
        assert len(order) == len(set(order)) == 2 * 2 * 8
        for chunk in range(2):
            for micro_batch in range(8):
                assert order.index(("F", chunk, micro_batch)) < order.index(("B", chunk, micro_batch))


def test_the_simulator_is_believed_near_what_was_measured(simulator) -> None:
    assert simulator.agree(measured=1.0, simulated=0.86) and simulator.agree(measured=1.0, simulated=1.04)
    assert not simulator.agree(measured=1.0, simulated=0.84) and not simulator.agree(measured=1.0, simulated=1.06)


def test_states_of_a_batch_against_logits_of_a_micro_batch(simulator) -> None:
    _, case = simulator.MEMORIES.values()
    ours, concatenated = simulator.taught(*case)
    states = 4096 * 4096 * 2 // 4  # of 4096 tokens, 4096 wide, in bf16, a fourth of the rows
    assert ours == 32 * states + 2 * 512 * 4 * 128256 // 4
    assert concatenated == states + 10 * 4096 * 4 * 128256 // 4
