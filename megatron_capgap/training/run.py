"""The parts of a training run, fixed before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.checkpoint.saver import Saver
from megatron_capgap.config.schema import Config
from megatron_capgap.data.batch import MicroBatch, TokenDataset
from megatron_capgap.devices import Device
from megatron_capgap.distillation.transfer import TeacherStates
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.distributed.watchdog import Watchdog
from megatron_capgap.losses import Loss
from megatron_capgap.runtime.logging import RunLogger
from megatron_capgap.training.optimizer import OptimizerState
from megatron_capgap.training.step import LossFunction


@dataclass(frozen=True)
class TrainingData:
    """The data of a run."""

    train: TokenDataset
    """Endless."""
    valid: TokenDataset | None
    """The held-out set, each sample once."""
    vocab_size: int
    """Size of the vocabulary without padding."""
    byte_lengths: Tensor
    """UTF-8 bytes of each token, float64 `[vocab]`."""
    global_batch: int
    """Samples of one optimizer step, over all data-parallel ranks."""


@dataclass(frozen=True)
class TrainingObjective:
    """The loss of a run."""

    loss_function: Callable[[Sequence[MicroBatch], TeacherStates | None], LossFunction]
    """Takes a global batch and the teacher's states of it; returns the loss function of each micro-batch."""
    teacher_forward: Callable[[int], TeacherStates] | None = None
    """Takes the number of a global batch's first sample; returns the teacher's states that this rank needs. None
    without a teacher."""
    matching_loss: Callable[[], Loss] | None = None
    """Returns the matching loss of the last global batch; see `train_step`."""
    report: tuple[str, ...] = ("cross_entropy",)
    """Names of the parts of the loss."""
    teacher_one_step_early: bool = False
    """Whether `teacher_forward` of a step runs within the step before, between the last backward pass and the reduction
    of gradients, which it hides. It depends on no student weight."""


@dataclass(frozen=True)
class RunCosts:
    """Predicted costs of a run, for reports."""

    flops_per_token: float
    """FLOPs per token of the student's training and the teacher's forward pass."""
    peak_flops: float | None
    """Peak FLOP/s of all ranks, if the configuration gives it."""
    memory_at_start: int
    """Peak bytes of this process before the model was built: the interpreter, its libraries, communication buffers."""
    memory_estimate: int
    """Additional bytes that --check predicts."""


@dataclass(frozen=True)
class Checkpointing:
    """How a run's state is saved."""

    saver: Saver
    metadata: Callable[[int], CheckpointMetadata]
    """Takes the number of steps done; returns the checkpoint's metadata."""
    check_ownership: Callable[[], None]
    """Raises UserError if another job has taken over the run directory. Rank 0 only."""


@dataclass(frozen=True)
class TrainingRun:
    """All parts of a training run."""

    config: Config
    run_dir: Path
    device: Device
    parallel: ParallelContext
    chunks: Sequence[DistributedDataParallel]
    optimizer: OptimizerState
    data: TrainingData
    objective: TrainingObjective
    costs: RunCosts
    checkpoints: Checkpointing
    log: RunLogger
    watchdog: Watchdog
    stop_at: float | None
    """Time limit on the clock of `time.monotonic`, at which the run saves and ends; None without a limit."""
    all_reduce_max: Callable[[int], int] | None = None
    """Maximum of a number over all ranks, if the teacher has ranks of its own. Collective, once per step."""
    steps_done: int = 0
    """Steps done by the state in `chunks` and `optimizer`."""
    steps_skipped: int = 0
    """Bad batches among them, which changed nothing."""
