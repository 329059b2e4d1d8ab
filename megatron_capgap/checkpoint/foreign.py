"""Checkpoints that Megatron-LM, or another program on Megatron-Core, wrote: known by their files, and not read."""

from __future__ import annotations

from pathlib import Path

from megatron_capgap.common.errors import UserError

_OURS = ("capgap.json", "contents.json")
_PATTERNS = ("latest_checkpointed_iteration.txt", "iter_*/.metadata", ".metadata", "*.distcp", "mp_rank_*")
"""What lies in a folder of several checkpoints, in one of them as torch_dist writes it, and in one as `torch` does."""


def refuse(folder: Path) -> None:
    """Raises what is to be said of a folder that holds such a checkpoint.

    Raises:
        UserError: it is one, whole or not.
    """
    if any((folder / name).exists() for name in _OURS):
        return
    found = next((mark for pattern in _PATTERNS for mark in sorted(folder.glob(pattern))), None)
    if found is not None:
        raise UserError(
            f"{folder}: is a checkpoint of Megatron-LM or of another program on Megatron-Core (it has "
            f"{found.relative_to(folder)}), which is not read here; convert it to Hugging Face's format, for example "
            "with Megatron-Bridge, and that with tools/convert_hf.py import"
        )
