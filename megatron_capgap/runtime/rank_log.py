"""The log of each rank, `run_dir/logs/rank_N.log`: what the console shows, and the rank's own warnings and errors."""

from __future__ import annotations

import logging
import os
import time
import traceback
from pathlib import Path

from megatron_capgap.common.errors import UserError
from megatron_capgap.common.log import LOG

_TIMES = logging.Formatter(datefmt="%Y-%m-%d %H:%M:%S")


class AppendedFile:
    """A file that is appended to. What a full disk does not take is kept in memory and written first the next time.

    Args:
        path: the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten = b""
        """What is not on disk yet."""
        self._file: int | None = None

    def append(self, text: str) -> OSError | None:
        """Writes text; returns the error if not all of it is on disk."""
        self.unwritten += text.encode()
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            while self.unwritten:
                self.unwritten = self.unwritten[os.write(self._file, self.unwritten) :]
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class RankLog(logging.Handler):
    """A rank's log; also a handler of `LOG` until it is closed. Lines are `DATE TIME LEVEL: TEXT`.

    Nothing is written before `open`. A full disk does not stop the run, and is not reported here: metrics.jsonl and
    checkpoints report it.

    Args:
        run_dir: the run directory.
        rank: rank of this process in the job.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__()
        self._file = AppendedFile(run_dir / "logs" / f"rank_{rank}.log")
        self._before: list[str] | None = []  # lines from before `open`; None: it is open
        LOG.addHandler(self)

    def open(self) -> None:
        """Creates or continues the file, and writes the lines from before."""
        self.acquire()
        try:
            if self._before is not None:
                self._file.path.parent.mkdir(exist_ok=True)
                self._file.append("".join(self._before))
                self._before = None
        except OSError:  # no folder on a full disk: the lines stay in memory
            return
        finally:
            self.release()

    def info(self, text: str) -> None:
        """Writes a line that is neither a warning nor an error."""
        self._write(time.strftime("%Y-%m-%d %H:%M:%S"), "info", text)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a warning or an error."""
        self._write(_TIMES.formatTime(record, _TIMES.datefmt), record.levelname.lower(), record.getMessage())

    def end(self, error: BaseException) -> None:
        """Writes the error that ends this rank, and closes the file."""
        text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
        self._write(time.strftime("%Y-%m-%d %H:%M:%S"), "error", text)
        self.close()

    def close(self) -> None:
        """Ends the log."""
        LOG.removeHandler(self)
        self._file.close()
        super().close()

    def _write(self, when: str, level: str, text: str) -> None:
        lines = "".join(f"{when} {level}: {line}\n" for line in text.split("\n"))
        self.acquire()
        try:
            if self._before is None:
                self._file.append(lines)
            else:
                self._before.append(lines)
        finally:
            self.release()
