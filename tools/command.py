"""What the tools' commands share: exit codes, and one error line per problem."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megatron_capgap.cli import INTERRUPTED, USER_ERROR
from megatron_capgap.common import log
from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed import process_group
from megatron_capgap.distributed.environment import Environment, read_environment
from megatron_capgap.law.files import LawError


def run_tool(
    name: str, work: Callable[[], int], *, place: str = "file system", interrupted: str = "interrupted"
) -> int:
    """Runs a tool in one process.

    Args:
        name: the tool's name, which its error lines start with.
        work: returns the exit code.
        place: what an error of the operating system is about if it names no file.
        interrupted: message after Ctrl-C.

    Returns:
        The exit code: that of `work`; 2 after a user error, with one line per problem on stderr; 130 after Ctrl-C.
    """
    code, message = _attempt(work, place, interrupted)
    if message:
        _print_error(name, code, message)
    return code


def run_tool_on_ranks(name: str, work: Callable[[Environment], int], *, interrupted: str = "interrupted") -> int:
    """Runs a tool on every rank of a launcher, and destroys its process groups. Only rank 0 prints errors.

    Args and returned exit code: as `run_tool`; `work` gets the launcher's environment.
    """
    first = True

    def on_this_rank() -> int:
        nonlocal first
        environment = read_environment()
        first = environment.rank == 0
        log.set_rank(environment.rank if environment.world > 1 else None)
        return work(environment)

    try:
        code, message = _attempt(on_this_rank, "file system", interrupted)
    finally:
        process_group.destroy_process_group()
    if message and first:
        _print_error(name, code, message)
    return code


def _attempt(work: Callable[[], int], place: str, interrupted: str) -> tuple[int, str]:
    """Exit code and message of `work`; no message if it returns."""
    try:
        return work(), ""
    except (UserError, LawError) as error:
        return USER_ERROR, str(error)
    except OSError as error:
        return USER_ERROR, f"{error.filename or place}: {error.strerror or error}"
    except KeyboardInterrupt:
        return INTERRUPTED, interrupted


def _print_error(name: str, code: int, message: str) -> None:
    kind = "error: " if code == USER_ERROR else ""
    print("\n".join(f"{name}: {kind}{line}" for line in message.split("\n")), file=sys.stderr)
