"""Early stopping: when the held-out loss has not fallen for a while, the run ends, and its best checkpoint stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_capgap.checkpoint import run_directory
from megatron_capgap.distributed import collectives
from megatron_capgap.runtime.metrics import evaluations


@dataclass
class EarlyStopping:
    """The held-out losses of a run so far. The same on all ranks."""

    patience: int | None
    """Evaluations in a row without a lower loss that end the run; None never ends it, and no checkpoint is the best."""
    best_step: int | None = None
    best_loss: float = float("inf")
    waited: int = 0
    """Evaluations since the best one."""

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.waited >= self.patience

    def update(self, step: int, loss: float) -> bool:
        """Takes note of an evaluation; whether it is the best so far, and its checkpoint to be kept."""
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.waited = step, loss, 0
            return self.patience is not None
        self.waited += 1
        return False


def restore(run_dir: Path, most: int | None, done: int) -> EarlyStopping:
    """What a run that goes on after `done` steps had seen by then, as metrics.jsonl has it. Collective.

    `best` is put right: a run may have been killed before it was written, or have gone back to an older checkpoint.
    """

    def read() -> EarlyStopping:
        patience = _after(most, ((step, loss) for step, loss in evaluations(run_dir) if step <= done))
        run_directory.set_best(run_dir, patience.best_step if most is not None else None)
        return patience

    return collectives.run_on_rank0(read)


def _after(most: int | None, seen: Iterable[tuple[int, float]]) -> EarlyStopping:
    patience = EarlyStopping(most)
    for step, loss in seen:
        patience.update(step, loss)
    return patience
