"""Bytes that torch's allocator hands out, counted event by event."""

from collections.abc import Callable
from typing import TypeVar

from benchmarks.loss import changes, most

T = TypeVar("T")


def allocations(run: Callable[[], T]) -> tuple[T, int, int]:
    """What `run` returns, and by how many bytes the allocated memory grew in the end, and at the most."""
    results: list[T] = []
    (events,) = changes(lambda: results.append(run()))
    return results[0], sum(events), most(events)
