"""What a training run consists of: its parts, fixed before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.checkpoint.saver import Saver
from megatron_capgap.config.schema import Config
from megatron_capgap.data.batch import MicroBatch, Samples
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
    """What a run reads."""

    train: Samples
    """Endless."""
    valid: Samples | None
    """The held-out set, each sample once."""
    vocab_size: int
    """Rows of the vocabulary that count, without padding."""
    byte_lengths: Tensor
    """UTF-8 bytes of each token, float64 `[vocab]`."""
    global_batch: int
    """Samples of one optimizer step, over all data-parallel ranks."""


@dataclass(frozen=True)
class TrainingObjective:
    """What is minimised."""

    loss_function: Callable[[Sequence[MicroBatch], TeacherStates | None], LossFunction]
    """From a global batch and the teacher's states of it to the loss of each micro-batch."""
    teacher_forward: Callable[[int], TeacherStates] | None = None
    """From the number of a global batch's first sample to the teacher's states that this rank needs; None without a
    teacher."""
    matching_loss: Callable[[], Loss] | None = None
    """What hidden-state matching added to the loss of the last global batch; see `train_step`."""


@dataclass(frozen=True)
class RunCosts:
    """What a run is expected to take."""

    flops_per_token: float
    """Of the student's training and the teacher's forward pass."""
    peak_flops: float | None
    """FLOP/s of all ranks at best, where the configuration says it."""
    memory_at_start: int
    """Peak bytes of this process before the model was built: the interpreter, its libraries, communication buffers."""
    memory_estimate: int
    """Bytes that --check predicts above that."""


@dataclass(frozen=True)
class CheckpointPolicy:
    """How a run's state gets to disk."""

    saver: Saver
    metadata: Callable[[int], CheckpointMetadata]
    """From the number of steps done to what the checkpoint says of itself."""
    check_ownership: Callable[[], None]
    """Raises UserError where the run directory belongs to another job by now. Rank 0 only."""


@dataclass(frozen=True)
class Run:
    """Everything a training run consists of."""

    config: Config
    run_dir: Path
    device: Device
    parallel: ParallelContext
    chunks: Sequence[DistributedDataParallel]
    optimizer: OptimizerState
    data: TrainingData
    objective: TrainingObjective
    costs: RunCosts
    checkpoints: CheckpointPolicy
    log: RunLogger
    watchdog: Watchdog
    stop_at: float | None
    """Of `time.monotonic`: when to save and end before the last step; None for never."""
    all_reduce_max: Callable[[int], int] | None = None
    """The largest of a number over all ranks, where a teacher has some of its own. Collective, once a step."""
    done: int = 0
    """Steps that the state in `chunks` and `optimizer` stands for."""
    skipped: int = 0
    """Those among them that were bad batches and changed nothing."""
