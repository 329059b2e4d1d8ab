"""Folders that are there whole or not at all: written beside their place, renamed at the end."""

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
    """An empty folder beside `out` that takes its place at the end; goes again where the work fails. Collective.

    Args:
        out: the place.
        ours: whether a folder that is there already is of the kind that may be replaced.
        force: replace it.

    Raises:
        UserError: `out` is there and not to be replaced, or cannot be made.
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
    """Refuses a place that is taken.

    Raises:
        UserError: with the way out.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UserError(f"{out}: is there already; choose another --out, or replace it with --force")
    if not out.is_dir() or not ours(out):
        raise UserError(f"{out}: is not something that this command wrote, so --force spares it; choose another --out")


def refuse_to_lose(source: Path, out: Path) -> None:
    """Refuses a place whose replacement would take along what is read.

    Raises:
        UserError: the source lies in it.
    """
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds {source}, which is read; choose another --out")


def _begin(out: Path, staged: Path, ours: Callable[[Path], bool], force: bool) -> None:
    refuse_existing(out, ours, force)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
