"""Fixtures and settings that all tests share."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support import failures
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures, make_material, make_student, make_teacher

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent
# NumPy's matrices are small in all tests, and two threads that share a core spin while they wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The same examples in every run, and no time limit for one: the machine may be busy.
settings.register_profile("capgap", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("capgap")


def pytest_configure() -> None:
    """Gives a process of pytest-xdist, and so all that it starts, one core of its own.

    The ranks of a small run wake each other all the time, and on a virtual machine waking a thread on another core is
    dear: four ranks train about as fast on one core as on two, and two pools then do not disturb each other.
    """
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


# pytest-xdist hands out whole files in this order: those that take long come first, the short ones fill the gaps.
FOLDERS = ("slurm", "end_to_end", "distributed", "gpu", "unit")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the folders. A slow test says why it is slow."""
    for item in items:
        for mark in item.iter_markers("slow"):
            if len(mark.args) != 1:
                raise pytest.UsageError(f'{item.nodeid}: write the reason, as in @pytest.mark.slow("why")')
    items.sort(key=lambda item: FOLDERS.index(item.path.relative_to(TESTS).parts[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A failed test prints what its ranks said."""
    report = yield
    if report.failed:
        report.sections += failures.told()
    if call.when == "teardown":
        failures.forget()
    return report


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """The gloo workers, started once for the whole session: `pool.run(function, *args, world=2)`."""
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def fresh_pool() -> Iterator[WorkerPool]:
    """As `pool`, of workers that have not imported Megatron: a test may decide what Megatron finds as it is."""
    workers = WorkerPool(size=3, fresh=True)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Fixtures:
    """A tokenizer and indexed datasets for runs on tiny models, made once for the whole session."""
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def teacher(pool: WorkerPool, fixtures: Fixtures) -> Path:
    """The run directory of a larger tiny model that has learned something."""
    return make_teacher(pool, fixtures)


@pytest.fixture(scope="session")
def student(pool: WorkerPool, fixtures: Fixtures) -> Path:
    """The run directory of a tiny model to finetune."""
    return make_student(pool, fixtures)
