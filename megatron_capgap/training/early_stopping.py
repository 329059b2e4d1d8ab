"""Early stopping: ends a run whose held-out loss stops falling, and keeps its best checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_capgap.checkpoint import run_directory
from megatron_capgap.distributed import collectives
from megatron_capgap.runtime.metrics import evaluations


@dataclass
class EarlyStopping:
    """State of early stopping: the best held-out loss so far. The same on all ranks."""

    patience: int | None
    """Consecutive evaluations without a lower loss after which the run ends; None disables early stopping and the best
    checkpoint."""
    best_step: int | None = None
    best_loss: float = float("inf")
    waited: int = 0
    """Evaluations since the best one."""

    @property
    def exhausted(self) -> bool:
        """Whether the run has to end."""
        return self.patience is not None and self.waited >= self.patience

    def update(self, step: int, loss: float) -> bool:
        """Records an evaluation. Returns whether it is the best so far, so that its checkpoint must be kept."""
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.waited = step, loss, 0
            return self.patience is not None
        self.waited += 1
        return False


def restore(run_dir: Path, patience: int | None, done: int) -> EarlyStopping:
    """State of early stopping after `done` steps, restored from metrics.jsonl when a run resumes. Collective.

    Also corrects the link `best`: the run may have been killed before it was written, or resumed from an older
    checkpoint.
    """

    def read() -> EarlyStopping:
        stopping = _after(patience, ((step, loss) for step, loss in evaluations(run_dir) if step <= done))
        run_directory.set_best(run_dir, stopping.best_step if patience is not None else None)
        return stopping

    return collectives.run_on_rank0(read)


def _after(patience: int | None, seen: Iterable[tuple[int, float]]) -> EarlyStopping:
    stopping = EarlyStopping(patience)
    for step, loss in seen:
        stopping.update(step, loss)
    return stopping
