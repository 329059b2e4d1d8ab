"""A training step reads one tensor from the device, once; every other read would make the process wait for it."""

import re
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_capgap.cli import main
from tests.distributed.test_overlap import MATCHED
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

STEPS = 4
# What makes a process wait for a GPU: reads of values, and operations whose result's size depends on values.
READS = {"tolist", "numpy", "cpu", "__array__"}
OPERATIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
# Lines that read host memory on every device: Megatron compares the CPU's random states; the others are branches for
# tensors on a CPU.
ON_HOST = ("random.py: if not torch.all(cpu_rng_state", "fused.py: if not (loss_gradient.is_cpu", "elif wrong.any()")
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"train__overlap": True}),
    "tp2_sp": (2, {"student__layout": {"tensor": 2, "sequence": True}, "train__dropout": 0.1}),
    "pp2": (2, {"student__layout": {"pipeline": 2}, "objective__matching": MATCHED}),
    "pp2_vp2": (2, {"student__layout": {"pipeline": 2, "virtual_pipeline": 2}, "teacher__layout": {"tensor": 2}}),
}


def _count(found: Counter[str], what: str) -> None:
    """Counts a read under the line that makes it, of the project or of Megatron."""
    frames = [frame for frame in traceback.extract_stack() if re.search("megatron(_capgap|/core)/", frame.filename)]
    place = f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "elsewhere"
    if not any(line in place for line in ON_HOST):
        found[f"{what} in {place}"] += 1


def _selects(function: Any, args: Any) -> bool:
    """Whether it is indexing by a mask."""
    if function._schema.name not in ("aten::index", "aten::index_put_", "aten::index_put"):
        return False
    if len(args) > 2 and args[2].ndim == 0:  # one number: torch fills in place of selecting
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


class Reads(TorchDispatchMode):
    """Counts the operations that read values, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in OPERATIONS or _selects(function, args):
            _count(self.found, function._schema.name)
        return function(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Counts the methods that read values without an operation, by place."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS:
            _count(self.found, name)
        return function(*args, **(kwargs or {}))


def reads_of_steps(words: list[str]) -> list[dict[str, int]]:
    """Runs a command; returns the reads of each of its steps on this rank, from one line of the log to the next."""
    from megatron_capgap.training import loop

    steps: list[dict[str, int]] = []
    reads, log_step, train = Reads(), loop._log_step, loop.train

    def log(*arguments: Any) -> None:
        log_step(*arguments)
        steps.append(dict(reads.found))
        reads.found.clear()

    def counted(run: loop.TrainingRun) -> None:
        with reads, Calls(reads.found):
            train(run)

    from megatron_capgap.stages import distill

    waits = mock.patch.object(torch.cuda, "synchronize", lambda *_: _count(reads.found, "synchronize"))
    with waits, mock.patch.object(loop, "_log_step", log), mock.patch.object(distill, "train", counted):
        assert main(words) == 0
    return steps


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_the_device_once(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, name: str
) -> None:
    world, changes = CASES[name]
    settings = {"train__steps": STEPS, "data__valid": None, "checkpoint__every": 0, **changes}
    config = runs.distill_config(fixtures, tmp_path / "run", teacher, **settings)
    words = ["distill", "--config", runs.write_config(config)]
    for rank in pool.run(reads_of_steps, words, world=world, initialise=False, capture=True):
        assert len(rank.value) == STEPS
        for step in rank.value[1:]:  # the first one's reads include those of the start
            assert list(step.values()) == [1], step


def test_a_read_is_counted() -> None:
    reads = Reads()
    with reads, Calls(reads.found):
        number = torch.ones(2)
        number.tolist()
        number.sum().item()
        bool(number.sum() > 1)
        number[number > 0]
    assert sum(reads.found.values()) == 4, reads.found


def order_of_work(words: list[str]) -> list[str]:
    """Runs a command; returns the teacher's forward passes (T) and the reductions of gradients (R) in their order."""
    from megatron_capgap.distillation.teacher import FrozenTeacher
    from megatron_capgap.training import step

    order: list[str] = []
    forward, reduce = FrozenTeacher.forward, step.finalize_model_grads

    def noted_forward(*arguments: Any) -> Any:
        order.append("T")
        return forward(*arguments)

    def noted_reduction(*arguments: Any, **options: Any) -> None:
        order.append("R")
        reduce(*arguments, **options)

    with (
        mock.patch.object(FrozenTeacher, "forward", noted_forward),
        mock.patch.object(step, "finalize_model_grads", noted_reduction),
    ):
        assert main(words) == 0
    return order


@pytest.mark.parametrize("name", CASES)
def test_the_teacher_runs_before_the_reduction_of_the_step_before(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, name: str
) -> None:
    """On a device it hides the reduction. It runs once per step, also in a run that stops and goes on."""
    world, changes = CASES[name]
    for steps, expected in ((1, "TR"), (STEPS, "TTRTRR")):
        settings = {"train__steps": steps, "data__valid": None, "optimizer__schedule": "constant", **changes}
        config = runs.distill_config(fixtures, tmp_path / "run", teacher, **settings)
        words = ["distill", "--config", runs.write_config(config)]
        ranks = pool.run(order_of_work, words, world=world, initialise=False, capture=True)
        assert ["".join(rank.value) for rank in ranks] == [expected] * world
