"""The one place that knows one release of Python or Megatron-Core from another.

Bounds first, which setup.py and tools/install.sh read from here; then what differs between the releases within them,
each difference a function that names the releases in its docstring, so that dropping a release is moving a bound and
deleting functions. Only the standard library is imported at the top: an interpreter without any package runs this file,

    python megatron_capgap/runtime/releases.py

and exits with 0 where it is new enough and not too new.
"""

from __future__ import annotations

import functools
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PYTHON = ((3, 10), (3, 14))
MEGATRON = ((0, 16), (0, 20))
"""First release, and the first one that is too new. pip takes the newest that the Python allows: 0.16 under 3.10 and
3.11, the newest of all under 3.12 and 3.13."""


def bounds(releases: tuple[tuple[int, int], tuple[int, int]]) -> str:
    """A range as pip writes it: `>=0.16,<0.20`."""
    low, high = (".".join(map(str, bound)) for bound in releases)
    return f">={low},<{high}"


REQUIREMENTS = (f"megatron-core{bounds(MEGATRON)}", "triton; sys_platform == 'linux' and python_version >= '3.12'")
"""Megatron-Core imports triton at its top from 0.18 on, without saying so; such releases need Python 3.12."""


def megatron() -> str | None:
    """The installed release of Megatron-Core, None where there is none."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return None


def complaint(found: str | None) -> str | None:
    """What to say of a Megatron-Core that the tests do not run against; the CPU device patches its internals."""
    fix = f"pip install 'megatron-core{bounds(MEGATRON)}'"
    if found is None:
        return f"megatron-core is not installed; {fix}"
    if not MEGATRON[0] <= _release(found) < MEGATRON[1]:
        return f"megatron-core {found} is outside the tested range; {fix}"
    return None


def _release(found: str) -> tuple[int, ...]:
    return tuple(int(part) for part in found.split(".")[:2])


@functools.cache  # asked for each weight and at each step, and the answer lies in a file
def release() -> tuple[int, ...]:
    """The first two numbers of the installed Megatron-Core's release, which must be there."""
    found = megatron()
    assert found is not None
    return _release(found)


def _at_least(*bound: int) -> bool:
    return release() >= bound


def mark_shard(weight: Any, dim: int) -> None:
    """Says along which dimension a tensor-parallel weight is sharded.

    Until 0.17 Megatron's layers say so as they initialise a weight, which this project does itself; from 0.18 on they
    say so in any case, and refuse to be told twice.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not _at_least(0, 18):
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def grads_for_norm(optimizer: Any) -> list[Any]:
    """The gradients of one of Megatron's optimizers that count on this rank, each weight once among all ranks.

    Until 0.18 the method is called get_main_grads_for_grad_norm; 0.19 leaves out there what has a norm of its own, of
    which these models have nothing.
    """
    return optimizer.get_grads_for_grad_norm() if _at_least(0, 19) else optimizer.get_main_grads_for_grad_norm()


def no_cuda_graphs() -> dict[str, list[str]]:
    """The argument of TransformerConfig that names what CUDA graphs capture, empty.

    Its default is the word "full", which each release calls deprecated as soon as a configuration is made. Until 0.17
    it is called cuda_graph_scope; 0.18 calls that name deprecated too.
    """
    return {"cuda_graph_modules" if _at_least(0, 18) else "cuda_graph_scope": []}


if __name__ == "__main__":
    sys.exit(not PYTHON[0] <= sys.version_info[:2] < PYTHON[1])
