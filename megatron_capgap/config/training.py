"""Configuration sections train, optimizer, checkpoint, runtime and profile."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from megatron_capgap.config.types import (
    STRICT,
    Decay,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)


@dataclass(frozen=True)
class TrainConfig:
    """Training length, batch sizes, evaluation and stop conditions."""

    __pydantic_config__ = STRICT

    steps: Positive | None = None
    """Optimizer steps of the whole run; required in adapt and distill. null in finetune: finetune.epochs determines the
    number."""
    global_batch: Positive | None = None
    """Sequences per optimizer step, over all ranks; null: micro_batch times the student's data-parallel size."""
    micro_batch: Positive = 1
    """Sequences per forward pass of one model replica."""
    eval_every: NonNegative = 0
    """Steps between evaluations on data.valid; 0: evaluate after the last step only."""
    eval_batches: Positive | None = None
    """Global batches per evaluation; null: all of data.valid."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of attention and residual branches."""
    max_grad_norm: PositiveFloat | None = None
    """A batch is bad if its gradient norm before clipping exceeds this value, or if its loss or gradient norm is not
    finite; null: the latter condition only."""
    max_skipped: NonNegative = 0
    """Number of bad batches that a run may skip without an update, over all restarts; the next one stops the run."""
    overlap: bool | None = None
    """Reduce gradients during the backward pass and gather weights during the forward pass; null: on GPUs only."""
    log_every: Positive = 1
    """Steps between console lines; metrics.jsonl records every step."""
    exit_after_minutes: PositiveFloat | None = None
    """Wall-clock minutes after which the run saves a checkpoint and exits, as after SIGTERM; null: no time limit."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    __pydantic_config__ = STRICT

    lr: PositiveFloat = 3.0e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate that the decay reaches after the last update; must not exceed lr."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from lr, at the first update after warm-up, to min_lr; constant: no decay."""
    warmup_fraction: Fraction = 0.01
    """Fraction of train.steps, rounded up, in which the learning rate rises linearly from 0 to lr."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    clip_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm; 0: no clipping."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    epsilon: PositiveFloat = 1.0e-8
    """Adam's epsilon."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept."""

    __pydantic_config__ = STRICT

    every: NonNegative = 0
    """Steps between checkpoints; 0: save after the last step only."""
    keep: Positive = 2
    """Number of newest checkpoints to keep."""
    async_save: bool = False
    """Continue training while a checkpoint is written from a copy of the state in host memory."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Timeouts and monitoring."""

    __pydantic_config__ = STRICT

    timeout_seconds: Positive = 600
    """Seconds that a collective may wait for other ranks before the job stops."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one GPU, used to report model FLOPs utilisation (MFU); null: not reported."""
    tensorboard: bool = True
    """Whether to write TensorBoard events to run_dir/tensorboard."""


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of torch's profiler, as Chrome traces in run_dir/profile. Not with a disjoint teacher."""

    __pydantic_config__ = STRICT

    steps: tuple[Positive, Positive]
    """First and last step that are recorded, for example [10, 12]; with what follows them, such as a save."""
    ranks: tuple[NonNegative, ...] = (0,)
    """Ranks that record, one file each."""
    shapes: bool = False
    """Record the shapes of each operator's inputs."""
    memory: bool = False
    """Record allocations."""
    stacks: bool = False
    """Record the Python source lines of each operator; slows the recorded steps down."""
