"""Atomic output folders: written under a temporary name, renamed when complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_capgap.common.errors import UserError
from megatron_capgap.common.fileio import put_in_place
from megatron_capgap.distributed.collectives import run_on_rank0


@contextmanager
def replacing(out: Path, ours: Callable[[Path], bool], *, force: bool) -> Iterator[Path]:
    """Yields an empty folder that replaces `out` on success and is deleted on failure. Collective.

    Args:
        out: the final path.
        ours: returns whether an existing folder may be replaced.
        force: whether to replace it.

    Raises:
        UserError: `out` exists and may not be replaced, or cannot be created.
    """
    staged = out.with_name(f".{out.name}.incomplete")
    run_on_rank0(lambda: _begin(out, staged, ours, force))
    try:
        yield staged
        dist.barrier()
        run_on_rank0(lambda: put_in_place(staged, out))
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(staged, ignore_errors=True)
        raise


def refuse_existing(out: Path, ours: Callable[[Path], bool], force: bool) -> None:
    """Raises if `out` exists and may not be replaced.

    Raises:
        UserError: `out` is not empty, and `force` is not set or the folder is not `ours`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UserError(f"{out}: already exists; choose another --out, or replace it with --force")
    if not out.is_dir() or not ours(out):
        raise UserError(f"{out}: was not written by this command, so --force does not replace it; choose another --out")


def refuse_to_lose(source: Path, out: Path) -> None:
    """Raises if replacing `out` would delete the source.

    Raises:
        UserError: the source is inside `out`.
    """
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: contains the input {source}; choose another --out")


def _begin(out: Path, staged: Path, ours: Callable[[Path], bool], force: bool) -> None:
    refuse_existing(out, ours, force)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
