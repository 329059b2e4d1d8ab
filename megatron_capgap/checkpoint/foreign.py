"""Detects checkpoints of Megatron-LM or another Megatron-Core program, which are not supported."""

from __future__ import annotations

from pathlib import Path

from megatron_capgap.common.errors import UserError

_OURS = ("capgap.json", "contents.json")
_PATTERNS = ("latest_checkpointed_iteration.txt", "iter_*/.metadata", ".metadata", "*.distcp", "mp_rank_*")
"""Files of a folder of checkpoints, of a torch_dist checkpoint and of a torch checkpoint."""


def refuse(folder: Path) -> None:
    """Raises if a folder is such a checkpoint.

    Raises:
        UserError: it is one, complete or not.
    """
    if any((folder / name).exists() for name in _OURS):
        return
    found = next((mark for pattern in _PATTERNS for mark in sorted(folder.glob(pattern))), None)
    if found is not None:
        raise UserError(
            f"{folder}: is a checkpoint of Megatron-LM or of another program on Megatron-Core (it has "
            f"{found.relative_to(folder)}), which is not supported; convert it to Hugging Face format, for example "
            "with Megatron-Bridge, then import that with tools/convert_hf.py import"
        )
