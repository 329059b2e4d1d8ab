"""What must be said to the libraries before they are imported."""

import logging
import os
import warnings

_MESSAGES = (".*Transformer Engine.*", ".*Apex.*", ".*CPU RNG state changed.*", ".*TypedStorage.*")
_MODULES = (r"megatron\..*", r"torch\.distributed\..*")


def prepare() -> None:
    """Filters their warnings and logs, and keeps torch's threads on a CPU awake. Call before they are imported."""
    _silence()
    _keep_threads_awake()


def _silence() -> None:
    """Of missing optional parts the start-up table speaks, once and in full."""
    for text in _MESSAGES:
        warnings.filterwarnings("ignore", message=text)
    for module in _MODULES:
        warnings.filterwarnings("ignore", module=module)
    # The third tells of CUDA's compiler where there is no GPU.
    for name in ("megatron", "torch.distributed.checkpoint", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_threads_awake() -> None:
    """Tells GNU OpenMP, which reads it when torch is loaded, how long its threads look out for work before they sleep.

    A copy on gloo's own thread starts a second team, and from then on there are more threads than cores: by default
    they would sleep at once, and each of the many small operations of a step wait 50 us for them to wake. "active" is
    a short watch then; its endless watch in all other cases is brought back to the default, 3 ms.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
