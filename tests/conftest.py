"""Fixtures and settings that all tests share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.pool import WorkerPool

# The same examples in every run, and no time limit for one: the machine may be busy.
settings.register_profile("capgap", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("capgap")


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """The gloo workers, started once for the whole session: `pool.run(function, *args, world=2)`."""
    workers = WorkerPool()
    yield workers
    workers.close()
