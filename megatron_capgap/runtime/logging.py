"""Output of a run: console, progress bar, metrics.jsonl, TensorBoard, and a log file of each rank.

Only rank 0 writes the former. On other ranks the methods of `RunLogger` write to the rank's log alone.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_capgap.common.log import LOG
from megatron_capgap.runtime.rank_log import AppendedFile, RankLog
from megatron_capgap.runtime.tracking import Trackers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLogger:
    """Console, metrics.jsonl, TensorBoard and this rank's log of a run.

    Args:
        run_dir: folder of metrics.jsonl and tensorboard/, which are created at the first record, and of logs/, which
            `open_rank_log` creates; None writes no files.
        is_rank0: whether this is rank 0; other ranks write their log only.
        tensorboard: whether to write TensorBoard events.
        rank: rank of this process in the job; None writes no log.
    """

    def __init__(
        self, run_dir: Path | None, is_rank0: bool, tensorboard: bool = False, rank: int | None = None
    ) -> None:
        self.is_rank0 = is_rank0
        self.console = Console(file=sys.stdout, quiet=not is_rank0, highlight=False, soft_wrap=True)
        self._run_dir = run_dir if is_rank0 else None
        self._writer: type[SummaryWriter] | None = None
        if self._run_dir is not None and tensorboard:
            # Imported before memory is measured: TensorBoard uses as much memory as a small model.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter
        self._rank_log = None if run_dir is None or rank is None else RankLog(run_dir, rank)
        self._metrics: AppendedFile | None = None
        self.trackers = Trackers()
        """Get the numbers of each record; none at first."""
        self._board: SummaryWriter | None = None
        self._progress: Progress | None = None

    def info(self, text: str) -> None:
        """Prints one line to the console, and to this rank's log."""
        self.console.print(text, markup=False)
        self._log(text)

    def warning(self, text: str) -> None:
        """Logs one warning."""
        if self.is_rank0:
            LOG.warning(text)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table, and its rows to this rank's log."""
        self._log("\n".join([title, *("  ".join(row) for row in rows)]))
        table = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def record(self, entry: Mapping[str, Any]) -> None:
        """Appends one object to metrics.jsonl and writes its numbers to TensorBoard, tagged by key.

        A full disk does not stop the run: unwritten entries are kept in memory and written before the next entry.
        """
        if self._run_dir is None:
            return
        if self._metrics is None:
            self._metrics = AppendedFile(self._run_dir / "metrics.jsonl")
            self._open_board(self._run_dir / "tensorboard", entry["step"])
        complete = not self._metrics.unwritten
        error = self._metrics.append(f"{json.dumps({**entry, 'time': round(time.time(), 3)})}\n")
        if error and complete:
            self.warning(f"{self._metrics.path}: {error.strerror}; kept in memory until there is space again")
        self._draw(entry)
        self.trackers.log(entry)

    def _open_board(self, folder: Path, first_step: int) -> None:
        try:
            if self._writer is not None:
                # Hides events that a killed run wrote after its last checkpoint.
                self._board = self._writer(str(folder), purge_step=first_step)
        except OSError as error:
            self.warning(f"{folder}: {error.strerror}; TensorBoard is disabled for this run")

    def _draw(self, entry: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        try:
            for name, value in entry.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, entry["step"])
        except OSError as error:  # from the writer thread, which has ended
            self.warning(f"{self._run_dir}/tensorboard: {error.strerror}; TensorBoard is disabled for this run")
            self._board = None

    def close(self) -> None:
        """Closes the progress bar and the files."""
        if self._progress is not None:
            self._progress.stop()
        if self._metrics is not None:
            self._metrics.close()
            if lost := len(self._metrics.unwritten):
                self.warning(f"{self._metrics.path} lacks its last {lost} bytes: no space left on device")
        if self._board is not None:
            with suppress(OSError):  # full disk: already reported, or only events are lost
                self._board.close()
        self.trackers.close()
        if self._rank_log is not None:
            self._rank_log.close()

    def open_rank_log(self) -> None:
        """Opens run_dir/logs/rank_N.log and writes what was logged before. Called once the run directory is there to
        stay; a run that is refused before leaves nothing in it."""
        if self._rank_log is not None:
            self._rank_log.open()

    def record_error(self, error: BaseException) -> None:
        """Writes the error that ends this rank to its log, with a traceback unless it is a UserError; ends log and
        trackers."""
        self.trackers.close(failed=True)
        if self._rank_log is not None:
            self._rank_log.end(error)

    def _log(self, text: str) -> None:
        if self._rank_log is not None:
            self._rank_log.info(text)

    def bar(self, done: int, total: int) -> None:
        """Starts a progress bar if the output is a terminal."""
        if self.is_rank0 and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self.console)
            self._progress.add_task("train", completed=done, total=total, line="")
            self._progress.start()

    def progress(self, step: int, total: int, line: str, every: int) -> None:
        """Shows step `step` of `total`: on the bar, or as a line every `every` steps; this rank's log gets the line."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, line=line)
            self._log(f"step {step}/{total}  {line}")
        elif step % every == 0 or step == total:
            self.info(f"step {step}/{total}  {line}")


class ThroughputMeter:
    """Throughput of the last step, and remaining time estimated from recent steps."""

    def __init__(self, flops_a_token: float) -> None:
        self._flops = flops_a_token
        self._last = time.perf_counter()
        self._recent: float | None = None

    def update(self, tokens: int) -> tuple[float, float, float]:
        """Ends a step.

        Args:
            tokens: tokens of the global batch.

        Returns:
            (seconds of the step, tokens per second, model FLOP/s), the latter two over all ranks.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._recent = seconds if self._recent is None else 0.9 * self._recent + 0.1 * seconds
        rate = tokens / max(seconds, 1e-9)
        return seconds, rate, rate * self._flops

    def pause(self) -> None:
        """Excludes the time since the last update from the next step, for example an evaluation or a save."""
        self._last = time.perf_counter()

    def eta(self, steps: int) -> str:
        """Estimated time of `steps` more steps, in words."""
        if self._recent is None or not math.isfinite(self._recent):
            return "?"
        seconds = round(self._recent * steps)
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"


def count(number: float, unit: str = "") -> str:
    """A number with three significant digits and a unit prefix: 12.3M."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.3g} {prefix}{unit}" if unit else f"{number / scale:.3g}{prefix}"
    return f"{number:.3g} {unit}".rstrip()
