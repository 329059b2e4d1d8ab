"""Bytes that torch's allocator hands out, counted event by event."""

from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def allocations(run: Callable[[], T]) -> tuple[T, int, int]:
    """What `run` returns, and by how many bytes the allocated memory grew in the end, and at the most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return result, now, most
