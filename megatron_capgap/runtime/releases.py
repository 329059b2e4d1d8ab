"""Differences between releases of Python and Megatron-Core; no other module distinguishes releases.

First the supported ranges, which setup.py and tools/install.sh read; then one function per difference, whose docstring
names the releases. To drop a release, move a bound and delete functions. The module level imports only the standard
library, so that any Python can run this file,

    python megatron_capgap/runtime/releases.py

which exits with 0 if the Python version is supported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PYTHON = ((3, 10), (3, 14))
MEGATRON = ((0, 16), (0, 20))
"""First supported and first unsupported release. pip installs the newest one for the Python version: 0.16 for 3.10 and
3.11, the newest of the range for 3.12 and 3.13."""


def bounds(releases: tuple[tuple[int, int], tuple[int, int]]) -> str:
    """A range in pip's notation: `>=0.16,<0.20`."""
    low, high = (".".join(map(str, bound)) for bound in releases)
    return f">={low},<{high}"


REQUIREMENTS = (f"megatron-core{bounds(MEGATRON)}", "triton; sys_platform == 'linux' and python_version >= '3.12'")
"""Megatron-Core imports triton unconditionally from 0.18 on, without declaring it; these releases require Python
3.12."""


def megatron() -> str | None:
    """Installed release of Megatron-Core; None if it is not installed."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return None


def complaint(found: str | None) -> str | None:
    """Message about an unsupported release of Megatron-Core; None if it is supported. The CPU device patches Megatron's
    internals."""
    fix = f"pip install 'megatron-core{bounds(MEGATRON)}'"
    if found is None:
        return f"megatron-core is not installed; {fix}"
    if not MEGATRON[0] <= _release(found) < MEGATRON[1]:
        return f"megatron-core {found} is outside the tested range; {fix}"
    return None


def _release(found: str) -> tuple[int, ...]:
    return tuple(int(part) for part in found.split(".")[:2])


@functools.cache  # called for each weight and step, and reads a file
def release() -> tuple[int, ...]:
    """Major and minor number of the installed Megatron-Core, which must be installed."""
    found = megatron()
    assert found is not None
    return _release(found)


def _at_least(*bound: int) -> bool:
    return release() >= bound


def mark_shard(weight: Any, dim: int) -> None:
    """Marks the dimension along which a tensor-parallel weight is sharded.

    Until 0.17 Megatron's layers set this attribute when they initialise a weight, which this project does itself; from
    0.18 on they always set it, and refuse to set it twice.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not _at_least(0, 18):
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def grads_for_norm(optimizer: Any) -> list[Any]:
    """Gradients of one of Megatron's optimizers that count towards the norm on this rank; each weight counts once among
    all ranks.

    Until 0.18 the method is called get_main_grads_for_grad_norm; in 0.19 that name excludes parameters with a norm of
    their own, which these models do not have.
    """
    return optimizer.get_grads_for_grad_norm() if _at_least(0, 19) else optimizer.get_main_grads_for_grad_norm()


def no_cuda_graphs() -> dict[str, list[str]]:
    """The argument of TransformerConfig that lists what CUDA graphs capture, empty.

    Its default, "full", causes a deprecation warning in every release. The argument is called cuda_graph_scope until
    0.17, a name that is deprecated from 0.18 on.
    """
    return {"cuda_graph_modules" if _at_least(0, 18) else "cuda_graph_scope": []}


@contextmanager
def bucket_padding_kept(optimizers: Sequence[Any]) -> Iterator[None]:
    """Within the context distributed optimizers gather their state in the layout that their sharded state is read in.

    In 0.16 to 0.19 the gathered state leaves out the padding at the end of each bucket, but parameters are looked up at
    places that count it: with several buckets, every parameter behind the first bucket would be saved with the values
    of others, without an error. Later releases subtract the padding (NVIDIA/Megatron-LM#5077).
    """
    for optimizer in optimizers:
        optimizer.get_parameter_state_dp_zero = functools.partial(_gather_with_padding, optimizer)
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer.get_parameter_state_dp_zero


def _gather_with_padding(optimizer: Any, *args: Any, **options: Any) -> Any:
    state = type(optimizer).get_parameter_state_dp_zero(optimizer, *args, **options)
    for index, buffer in enumerate(optimizer.buffers):
        for tensors in state[index].values() if state is not None and len(buffer.buckets) > 1 else ():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                parts = tensors[name].split([bucket.numel_unpadded for bucket in buffer.buckets])
                padded = tensors[name].new_zeros(buffer.numel)
                for bucket, part in zip(buffer.buckets, parts, strict=True):
                    padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = part
                tensors[name] = padded
    return state


if __name__ == "__main__":
    sys.exit(not PYTHON[0] <= sys.version_info[:2] < PYTHON[1])
