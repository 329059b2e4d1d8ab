"""Silences what Megatron-Core and torch say about missing optional parts; the start-up table says it once, in full."""

import logging
import warnings

_MESSAGES = (".*Transformer Engine.*", ".*Apex.*", ".*CPU RNG state changed.*", ".*TypedStorage.*")
_MODULES = (r"megatron\..*", r"torch\.distributed\..*")


def quiet_libraries() -> None:
    """Filters their warnings and logs. Call before they are imported: some speak while importing."""
    for text in _MESSAGES:
        warnings.filterwarnings("ignore", message=text)
    for module in _MODULES:
        warnings.filterwarnings("ignore", module=module)
    for name in ("megatron", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
