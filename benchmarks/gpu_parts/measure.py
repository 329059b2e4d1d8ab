"""Timing, memory and the report: what all parts of benchmarks/gpu.py share."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

WARM_UPS, REPEATS, LEAST_REPEATS = 3, 10, 3
TINY_WARM_UPS, TINY_REPEATS = 1, 2


class OutOfTime(Exception):
    """The part's time is used up."""


class DeviceLost(Exception):
    """The GPU refuses all further work of this process, after the contender that the message names."""


@dataclass(frozen=True)
class Report:
    """Results as JSON lines, each written as soon as it is known.

    A row has `part`, `case` (sizes), `name` (contender) and either numbers, `error` or `absent`.
    """

    file: Path
    common: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every row."""

    def add(self, part: str, case: str, name: str, *, quiet: bool = False, **values: Any) -> None:
        """Appends a row, and prints it unless `quiet`."""
        row = {**self.common, "part": part, "case": case, "name": name, **values}
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        if quiet:
            return
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in values.items() if value is not None)
        print(f"{part:<10}{case:<28}{name:<42} {shown}", flush=True)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(file: Path, *, device: str, tiny: bool) -> list[dict[str, Any]]:
    """Rows of a report that were measured on such a device; of two with the same part, case and name the later one.

    A last line that was cut off is left out.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["device"] == device and row["tiny"] == tiny:
            key = row["part"], row["case"], row["name"]
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values())


@dataclass(frozen=True)
class Bench:
    """What a part needs to measure."""

    device: str
    """cpu or cuda."""
    tiny: bool
    """Small sizes and few repeats: a rehearsal, whose times mean nothing."""
    report: Report
    out: Path
    """Folder of traces."""
    ends: float
    """`time.monotonic` at which the part's time is used up."""
    skip: frozenset[str] = frozenset()
    """Contenders that are left out."""

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    @property
    def repeats(self) -> int:
        """Timed calls of a contender."""
        return TINY_REPEATS if self.tiny else REPEATS

    def check_time(self) -> None:
        """Raises OutOfTime if the part's time is used up."""
        if time.monotonic() > self.ends:
            raise OutOfTime

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one call: between two CUDA events around it, on a CPU by the clock."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Most bytes that a call allocates at a time beyond what was allocated before it; None on a CPU."""
        if not self.cuda:
            run()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def attempt(self, part: str, case: str, name: str, run: Callable[[], Any]) -> Any:
        """The result of `run`, or None after an exception, which becomes a row of the report.

        Raises:
            OutOfTime: from `run`.
            DeviceLost: the GPU refuses all further work.
        """
        if name in self.skip:
            self.report.add(part, case, name, error="left out: the GPU was lost in it")
            return None
        try:
            return run()
        except OutOfTime:
            raise
        except ImportError as error:
            self.report.add(part, case, name, absent=f"not installed: {_first_line(error)}")
        except Exception as error:
            self.report.add(part, case, name, error=f"{type(error).__name__}: {_first_line(error)}")
            error.__traceback__ = None  # its frames hold tensors
        try:
            if self.cuda:
                torch.cuda.synchronize()
            self.collect()
        except Exception as error:
            raise DeviceLost(name) from error
        return None

    def in_turn(
        self,
        part: str,
        case: str,
        contenders: Mapping[str, Callable[[], object]],
        values: Callable[[str, float, int | None], Mapping[str, Any]] = lambda name, seconds, peak: {},
    ) -> dict[str, float]:
        """Times contenders alternately, so that what disturbs the device disturbs all; a row for each.

        The warm-up calls compile; the last of them measures memory. One that fails in its warm-up or later is dropped.
        Where the time is used up, the median is that of the calls so far, at least three.

        Args:
            part, case: of the rows.
            contenders: by name.
            values: further fields of a row, from name, median seconds and peak bytes.

        Returns:
            Median seconds by name, of those that were timed.
        """
        taken: dict[str, list[float]] = {}
        peaks: dict[str, int | None] = {}
        for name, run in contenders.items():
            try:
                self.check_time()
                done = self.attempt(part, case, name, lambda run=run: (self._warm_up(run), self.seconds(run)))
            except OutOfTime:
                self.report.add(part, case, name, error="not run: out of time")
                continue
            if done is not None:
                peaks[name], first = done
                taken[name] = [first]
                # Kept if the process is killed; the row of all calls replaces it.
                row = {"ms": first * 1e3, "repeats": 1, "peak_bytes": peaks[name]}
                self.report.add(part, case, name, quiet=True, **{**row, **values(name, first, peaks[name])})
        for index in range(self.repeats - 1):
            if index >= LEAST_REPEATS - 1 and time.monotonic() > self.ends:
                break
            for name in list(taken):
                found = self.attempt(part, case, name, lambda name=name: self.seconds(contenders[name]))
                taken[name] += [] if found is None else [found]
                if found is None:
                    del taken[name]
        medians = {name: statistics.median(times) for name, times in taken.items()}
        for name, median in medians.items():
            spread = (max(taken[name]) - min(taken[name])) / median
            row = {"ms": median * 1e3, "spread": spread, "repeats": len(taken[name]), "peak_bytes": peaks[name]}
            self.report.add(part, case, name, **{**row, **values(name, median, peaks[name])})
        return medians

    def _warm_up(self, run: Callable[[], object]) -> int | None:
        for _ in range((TINY_WARM_UPS if self.tiny else WARM_UPS) - 1):
            run()
        return self.peak_bytes(run)

    def collect(self) -> None:
        """Frees what nothing refers to."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def randn(self, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
        """Normal random numbers in bf16; zeros would draw less power and be multiplied faster."""
        make = torch.Generator(self.device).manual_seed(seed)
        return (torch.randn(*shape, device=self.device, generator=make, dtype=torch.float32) * scale).bfloat16()


def free(tensors: Iterable[Any]) -> None:
    """Returns the memory of tensors to the allocator, whatever still refers to them (autograd's hooks hold models)."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            tensor.untyped_storage().resize_(0)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
