"""Collectives as they pass torch's dispatcher, whatever function of torch.distributed asked for them."""

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")
NAMES = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
}


def counted(run: Callable[[], T]) -> tuple[T, dict[str, int]]:
    """What `run` returns, and how many collectives of each kind it made; unknown kinds keep torch's name."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        result = run()
    names = (event.name() for event in recorded.profiler.kineto_results.events())
    return result, dict(Counter(NAMES.get(name, name) for name in names if name.startswith("c10d::")))
