"""Settings of third-party libraries that must be made before they are imported."""

import logging
import os
import warnings

_MESSAGES = (".*Transformer Engine.*", ".*Apex.*", ".*CPU RNG state changed.*", ".*TypedStorage.*")
_MODULES = (r"megatron\..*", r"torch\.distributed\..*")


def prepare() -> None:
    """Filters library warnings and logs, and keeps torch's CPU threads spinning. Call before importing the
    libraries."""
    _silence()
    _keep_threads_awake()


def _silence() -> None:
    """Hides warnings about missing optional components, which the start-up table lists."""
    for text in _MESSAGES:
        warnings.filterwarnings("ignore", message=text)
    for module in _MODULES:
        warnings.filterwarnings("ignore", module=module)
    # The third one warns about a missing CUDA compiler on machines without a GPU.
    for name in ("megatron", "torch.distributed.checkpoint", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_threads_awake() -> None:
    """Configures how long GNU OpenMP threads spin before they sleep; read when torch is loaded.

    A copy on gloo's own thread starts a second team, after which there are more threads than cores: by default threads
    then sleep at once, and each of the many small operations of a step waits 50 us for them to wake. With "active" they
    spin briefly in that case; its infinite spinning in all other cases is reduced to the default, 3 ms.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
