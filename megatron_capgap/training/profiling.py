"""Traces of torch's profiler over some steps of a run, in run_dir/profile."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import profile, schedule

from megatron_capgap.common.log import LOG
from megatron_capgap.training.run import TrainingRun


class StepProfiler:
    """Records the steps of `profile.steps` on the ranks of `profile.ranks`; a context manager around the training loop.

    The step before the first one is the profiler's warm-up: what it takes to start is not in the trace. A run that ends
    within the steps writes what was recorded. On other ranks and steps it does nothing.

    Args:
        run: the run.
        done: steps done before the first one here.
    """

    def __init__(self, run: TrainingRun, done: int) -> None:
        self._run, self._done = run, done
        self._steps = range(0)
        if (config := run.config.profile) and dist.get_rank() in config.ranks:
            self._steps = range(max(config.steps[0], done + 1), config.steps[1] + 1)
        self._profile: Any = None

    def __enter__(self) -> StepProfiler:
        return self

    def start_step(self) -> None:
        """Called before each step."""
        self._done += 1
        if self._profile is not None:
            self._profile.step()
            if self._done not in self._steps:
                self._end()
        elif self._steps and self._done in (self._steps[0] - 1, self._steps[0]):
            self._start(warm_up=self._steps[0] - self._done)

    def __exit__(self, *unused: object) -> None:
        if self._profile is not None:
            self._end()

    def _start(self, *, warm_up: int) -> None:
        config = self._run.config.profile
        assert config is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a first step that cannot have a warm-up
            steps = schedule(wait=0, warmup=warm_up, active=len(self._steps), repeat=1)
        self._profile = profile(
            activities=self._run.device.profiler_activities,
            schedule=steps,
            on_trace_ready=self._write,
            record_shapes=config.shapes,
            profile_memory=config.memory,
            with_stack=config.stacks,
        )
        self._profile.start()

    def _end(self) -> None:
        self._profile.stop()
        self._profile = None
        self._steps = range(0)

    def _write(self, recorded: Any) -> None:
        """Writes the trace. A full disk does not stop the run."""
        first, last = self._steps[0], min(self._done, self._steps[-1])
        folder = self._run.run_dir / "profile"
        path = folder / f"rank_{dist.get_rank()}_steps_{first}-{last}.json.gz"
        try:
            folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except OSError as error:
            _remove(path)
            LOG.warning(f"{path}: {error.strerror or error}; there is no trace of this rank")
        else:
            self._run.log.info(f"profile of steps {first} to {last}: {path}")


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
