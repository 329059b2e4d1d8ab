"""Warnings and errors of a run, on stderr with time and rank: `23:17:45 rank 3 capgap: warning: TEXT`.

`LOG` is an ordinary logger of Python's `logging`: a program that embeds this package can add handlers to it. Errors of
the command line and the configuration are not logged: `cli.main` prints them as the result of the command.
"""

from __future__ import annotations

import logging
import sys

LOG = logging.getLogger("megatron_capgap")


_TIMES = logging.Formatter()


class _Handler(logging.Handler):
    """Writes to whatever `sys.stderr` is at the time of the message."""

    rank: int | None = None

    def format(self, record: logging.LogRecord) -> str:
        """The message, and its traceback if there is one, with the prefix before each line."""
        time = _TIMES.formatTime(record, "%H:%M:%S")
        who = "" if self.rank is None else f"rank {self.rank} "
        text = record.getMessage() + (f"\n{_TIMES.formatException(record.exc_info)}" if record.exc_info else "")
        return "".join(f"{time} {who}capgap: {record.levelname.lower()}: {line}\n" for line in text.split("\n"))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes at once: the process may end with this message."""
        try:
            sys.stderr.write(self.format(record))
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_HANDLER = _Handler()
LOG.addHandler(_HANDLER)
LOG.setLevel(logging.INFO)
LOG.propagate = False


def set_rank(rank: int | None) -> None:
    """Sets the rank that messages of this process show; None: no rank."""
    _HANDLER.rank = rank
