"""Which implementation computes the loss's passes: plain torch, or Triton kernels."""

import importlib.util
from functools import cache
from typing import Literal, get_args

from torch import Tensor

from megatron_capgap.common.errors import UserError

Kernels = Literal["auto", "eager", "triton"]


def uses_triton(kernels: Kernels, tensor: Tensor) -> bool:
    """Whether the passes over this tensor's device run as Triton kernels.

    Args:
        kernels: auto: Triton on a GPU if it is installed, otherwise eager; eager: plain torch; triton: on a GPU, or on
            a CPU in Triton's interpreter, which is slow and for tests.
        tensor: any of the tensors.

    Raises:
        UserError: unknown value, or triton is asked for where it cannot run.
    """
    if kernels not in get_args(Kernels):
        raise UserError(f"kernels: {kernels!r} is unknown; valid values: {', '.join(get_args(Kernels))}")
    if kernels == "eager" or (kernels == "auto" and not (tensor.is_cuda and _installed())):
        return False
    if not _installed():
        raise UserError("kernels: triton is not installed; run pip install triton, or set kernels to auto or eager")
    if tensor.is_cpu and not _interpreted():
        raise UserError(
            "kernels: triton needs tensors on a CUDA GPU; set kernels to auto or eager, or for a test the environment "
            "variable TRITON_INTERPRET=1 before triton is imported"
        )
    return True


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from megatron_capgap.losses.kernels import in_interpreter

    return in_interpreter()
