"""Start-up and shutdown that all stages share: process groups, run directory, data, weights."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from megatron_capgap.checkpoint import loader
from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.checkpoint.run_directory import begin_training_run
from megatron_capgap.checkpoint.saver import Saver
from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.loader import changes, dump, plain
from megatron_capgap.config.schema import Config
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.devices import Device
from megatron_capgap.distillation.transfer import TeacherStates
from megatron_capgap.distributed import collectives, parallel_context, process_group
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.distributed.role_groups import RoleGroups
from megatron_capgap.distributed.watchdog import Watchdog
from megatron_capgap.losses import Loss, language_model_loss
from megatron_capgap.models import gpt, memory, projections, size
from megatron_capgap.models.fp8_weights import cast_params_to_fp8
from megatron_capgap.models.sharded_state import initialise
from megatron_capgap.runtime import tracking
from megatron_capgap.runtime.logging import RunLogger
from megatron_capgap.runtime.metrics import drop_metrics_after
from megatron_capgap.runtime.run_lock import RunLock
from megatron_capgap.stages import datasets
from megatron_capgap.stages.plan import RunPlan
from megatron_capgap.stages.summary import log_summary
from megatron_capgap.training import optimizer
from megatron_capgap.training.checkpointing import resume
from megatron_capgap.training.neftune import Neftune
from megatron_capgap.training.run import Checkpointing, RunCosts, TrainingData, TrainingObjective, TrainingRun
from megatron_capgap.training.step import LossFunction

_RESOLVED = "resolved.yaml"


PlanT = TypeVar("PlanT", bound=RunPlan)
PlanInContextT = TypeVar("PlanInContextT", bound=RunPlan, covariant=True)


@dataclass(frozen=True)
class StageContext(Generic[PlanInContextT]):
    """Resources of a stage: plan, ranks, device and run directory."""

    plan: PlanInContextT
    device: Device
    rank: int
    """Rank of this process among all ranks of the job."""
    parallel: ParallelContext
    roles: RoleGroups | None
    """Connection between the student's and the teacher's ranks, if the teacher is disjoint."""
    memory_at_start: int
    """Peak bytes of this process before a model was built."""
    stop_at: float | None
    """`time.monotonic` at which the run saves and exits before its end; None: no limit."""
    log: RunLogger
    lock: RunLock
    """Held by rank 0."""
    watchdog: Watchdog
    """Publishes what this rank is doing."""

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.plan.config

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return Path(self.config.run_dir)


@contextmanager
def stage_context(plan: PlanT, environment: Environment, device: Device) -> Iterator[StageContext[PlanT]]:
    """Creates the process groups and opens the run directory; destroys the groups at the end. Collective.

    A run directory that was created here is removed if the stage fails before it has called `commit_run_dir`.

    Raises:
        UserError: on every rank.
    """
    config = plan.config
    minutes = config.train.exit_after_minutes
    stop_at = None if minutes is None else time.monotonic() + 60.0 * minutes
    timeout, layout, roles = config.runtime.timeout_seconds, config.student.layout, None
    if plan.student_world < plan.world:
        roles = RoleGroups(environment, device, derived.teacher_rank_range(config, plan.world), timeout)
        watchdog = roles.watchdog
    else:
        watchdog = Watchdog(
            process_group.init_process_group(environment, device, timeout), environment.rank, environment.world, timeout
        )
    log, lock = None, RunLock(Path(config.run_dir))
    new = _missing_parents(Path(config.run_dir)) if environment.rank == 0 else []

    def open_run_dir() -> tuple[list[str], int | None]:
        return collectives.run_on_rank0(lambda: _open_run_dir(plan, lock))

    try:
        warnings, steps = list[str](), config.train.steps
        if roles is None:
            warnings, steps = open_run_dir()
        elif roles.is_teacher:
            layout = derived.teacher_layout(config)
            roles.barrier_with_errors(lambda: None)
        else:
            warnings, steps = roles.barrier_with_errors(open_run_dir)
        plan = datasets.with_steps(plan, steps)
        parallel = parallel_context.build(layout, config.seed, timeout)
        log = RunLogger(Path(config.run_dir), environment.rank == 0, config.runtime.tensorboard, environment.rank)
        for warning in warnings:
            log.warning(warning)
        log_summary(log, plan, device)
        memory_at_start = device.peak_memory()
        watchdog.activity = plan.stage
        yield StageContext(
            plan, device, environment.rank, parallel, roles, memory_at_start, stop_at, log, lock, watchdog
        )
    except BaseException as error:
        lock.release()
        _remove_if_uncommitted(new)
        if not isinstance(error, UserError):
            watchdog.report(error)
            _log_error(log, error, Path(config.run_dir))
            raise  # this rank only: destroying the groups could wait for other ranks and hide the error
        error.raised_on_all_ranks = True
        _log_error(log, error, Path(config.run_dir))
        watchdog.stop()
        _shut_down(log)
        raise
    lock.release()
    watchdog.stop()
    _shut_down(log)


def _log_error(log: RunLogger | None, error: BaseException, run_dir: Path) -> None:
    """Writes the error that ends this rank to its log. A run that is refused before it starts or continues logs
    nothing; one that crashes there does, if its directory is that of an earlier start."""
    if log is None:
        return
    if not isinstance(error, UserError) and (run_dir / _RESOLVED).exists():
        log.open_rank_log()
    log.record_error(error)


def _shut_down(log: RunLogger | None) -> None:
    if log is not None:
        log.close()
    parallel_context.destroy()
    process_group.destroy_process_group()


def build_student(ctx: StageContext[RunPlan], *, trains: bool = True) -> list[torch.nn.Module]:
    """Builds the student's model chunks on this rank, from its checkpoint or from random weights, with projections for
    matched layers of different widths. Collective."""
    plan, config = ctx.plan, ctx.config
    precision = derived.student_precision(config)
    chunks = gpt.build(
        plan.student,
        ctx.parallel,
        precision,
        ctx.device,
        sequence_length=config.data.sequence_length,
        dropout=config.train.dropout,
        recompute=config.student.recompute if trains else None,
        use_attention_mask=plan.template is not None,
    )
    if plan.teacher is not None:
        pairs = derived.projected_pairs(config, plan.student, plan.teacher)
        projections.add(chunks, pairs, plan.teacher.hidden)
    if plan.student_source is not None:
        loader.load_weights(plan.student_source.folder, chunks, ctx.parallel)
    initialise(chunks, plan.student, ctx.parallel, config.seed, only_projections=plan.student_source is not None)
    cast_params_to_fp8(chunks, precision, backward=trains, masters=trains)
    return chunks


def adds_into_main_grad(device: Device) -> bool:
    """Whether the loss adds the LM head's gradient to DDP's buffer within its matrix products, without another buffer.

    GPUs can; on a CPU the product is rounded to the type of its factors first, and a buffer per call saves nothing.
    """
    return device.name != "cpu"


def language_model_run(ctx: StageContext[RunPlan]) -> TrainingRun:
    """Training run of a student without a teacher. Collective."""
    vocab_size, parallel = ctx.plan.student.vocab, ctx.parallel
    into_main_grad = adds_into_main_grad(ctx.device)

    def loss(hidden: Tensor, lm_head: Tensor, batch: MicroBatch) -> Loss:
        return language_model_loss(
            hidden.flatten(0, 1),
            lm_head,
            *batch.flat(),
            vocab_size=vocab_size,
            group=parallel.groups.tp,
            sequence_parallel=parallel.layout.sequence,
            into_main_grad=into_main_grad,
        )

    return training_run(ctx, build_student(ctx), TrainingObjective(lambda batches, teacher_states: loss))


def training_run(
    ctx: StageContext[RunPlan], student: list[torch.nn.Module], objective: TrainingObjective
) -> TrainingRun:
    """Creates optimizer and data, restores the newest checkpoint of the run, and commits the run directory. Collective.

    Args:
        ctx: context of the stage.
        student: the student's model chunks on this rank.
        objective: what is minimised.
    """
    config, plan = ctx.config, ctx.plan
    overlap = ctx.device.name != "cpu" if config.train.overlap is None else config.train.overlap
    chunks = optimizer.wrap(student, ctx.parallel, derived.student_precision(config), overlap=overlap)
    checkpointing = config.checkpoint
    saver = Saver(
        ctx.run_dir,
        checkpointing.keep,
        async_save=checkpointing.async_save,
        timeout_seconds=config.runtime.timeout_seconds,
        on_saved=lambda step, seconds: ctx.log.info(f"step {step}: checkpoint saved in {seconds:.1f} s"),
    )
    run = TrainingRun(
        config=config,
        run_dir=ctx.run_dir,
        device=ctx.device,
        parallel=ctx.parallel,
        chunks=chunks,
        optimizer=optimizer.build(chunks, config, ctx.device),
        data=TrainingData(
            train=datasets.open_training(plan),
            valid=datasets.open_validation(plan),
            vocab_size=plan.student.vocab,
            byte_lengths=padded_byte_lengths(plan),
            global_batch=plan.global_batch,
        ),
        objective=_with_neftune(ctx, student, objective),
        costs=_costs(ctx),
        checkpoints=Checkpointing(saver, lambda done: checkpoint_metadata(ctx, done), ctx.lock.check_ownership),
        log=ctx.log,
        watchdog=ctx.watchdog,
        stop_at=ctx.stop_at,
    )
    run = resume(run)
    commit_run_dir(ctx, run.steps_done)
    return run


def _costs(ctx: StageContext[RunPlan]) -> RunCosts:
    config, plan = ctx.config, ctx.plan
    peak, models = config.runtime.peak_tflops, (plan.student, plan.teacher)
    on_cpu = ctx.device.name == "cpu"
    return RunCosts(
        flops_per_token=size.training_flops(*models, config.data.sequence_length),
        peak_flops=None if peak is None else peak * 1e12 * plan.world,
        memory_at_start=ctx.memory_at_start,
        memory_estimate=memory.estimate(config, plan.stage, *models, plan.world, on_cpu=on_cpu).total,
    )


def _with_neftune(
    ctx: StageContext[RunPlan], student: list[torch.nn.Module], objective: TrainingObjective
) -> TrainingObjective:
    """The objective, with NEFTune noise on the student's embeddings if finetune.neftune_alpha is set."""
    alpha = ctx.plan.finetune.neftune_alpha
    if not alpha:
        return objective
    neftune = Neftune(student, ctx.parallel, alpha, ctx.config.seed)

    def loss_function(batches: Sequence[MicroBatch], teacher_states: TeacherStates | None) -> LossFunction:
        neftune.start_batch(batches)
        return objective.loss_function(batches, teacher_states)

    return replace(objective, loss_function=loss_function)


def padded_byte_lengths(plan: RunPlan) -> torch.Tensor:
    """UTF-8 bytes per token, float64 `[vocab]`: 0 for ids that only the model has; ids that only the tokenizer has are
    omitted."""
    lengths = torch.zeros(plan.student.vocab, dtype=torch.float64)
    known = torch.as_tensor(plan.tokenizer.byte_lengths(), dtype=torch.float64)[: len(lengths)]
    lengths[: len(known)] = known
    return lengths


def commit_run_dir(ctx: StageContext[RunPlan], done: int = 0) -> None:
    """Writes resolved.yaml after all models and data are loaded, and removes metrics beyond the checkpoint. Collective.

    Args:
        ctx: context of the stage.
        done: steps that the run has completed.
    """
    plan, path = ctx.plan, ctx.run_dir / _RESOLVED
    is_complete = done > 0 and done == ctx.config.train.steps  # then its directory stays as it is

    def write() -> list[str]:
        if ctx.config.track is not None and not is_complete:
            ctx.log.trackers.add(tracking.start(ctx.config.track, plain(ctx.config), plan.stage, ctx.run_dir))
        if plan.stage != "evaluate":
            drop_metrics_after(ctx.run_dir, done)
            begin_training_run(ctx.run_dir)
        changed = changes(ctx.config, path) if done else []
        if not (is_complete and path.exists()):
            dump(ctx.config, str(path))
        return changed

    changed = collectives.run_on_rank0(write)
    if not is_complete:
        ctx.log.open_rank_log()
    if changed:
        ctx.log.info(f"changed since the last start: {'; '.join(changed)}")


def _open_run_dir(plan: RunPlan, lock: RunLock) -> tuple[list[str], int | None]:
    """Creates the run directory, validates the data and builds its indices. Rank 0 only; errors reach every rank.

    Returns:
        Warnings (a dead job's lock, the tokenizer, the data), and the number of steps of the run.
    """
    config = plan.config
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        place = plan.loaded.location("run_dir")
        raise UserError(f"{place}: {run_dir} is not writable ({error.strerror}); choose another run_dir") from error
    warning = lock.acquire()
    data_warnings = datasets.build_indices(plan)
    return [*([warning] if warning else []), *plan.warnings, *data_warnings], datasets.steps(plan)


def _missing_parents(run_dir: Path) -> list[Path]:
    """The run directory and its parents that do not exist yet, innermost first."""
    return [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]


def _remove_if_uncommitted(new: list[Path]) -> None:
    """Removes the folders that this run created, unless the run directory is committed or a folder has other
    contents."""
    if not new or (new[0] / _RESOLVED).exists():
        return
    shutil.rmtree(new[0], ignore_errors=True)
    with suppress(OSError):
        for folder in new[1:]:
            folder.rmdir()


def checkpoint_metadata(ctx: StageContext[RunPlan], done: int) -> CheckpointMetadata:
    """Metadata of a checkpoint after `done` steps."""
    plan, config = ctx.plan, ctx.config
    samples = done * plan.global_batch
    fp8 = derived.student_precision(config).fp8
    begun_from = plan.student_source.meta if plan.student_source else None
    return CheckpointMetadata(
        step=done,
        steps=config.train.steps or done,
        tokens=samples * config.data.sequence_length,
        model=plan.student,
        tokenizer=config.data.tokenizer,
        tokenizer_fingerprint=plan.tokenizer.fingerprint,
        stage=plan.stage,
        seed=config.seed,
        parallel_sizes=loader.parallel_sizes(ctx.parallel),
        device=ctx.device.name,
        projections=derived.projection_names(config, plan.student, plan.teacher),
        sequence_length=config.data.sequence_length,
        fp8_recipe=fp8.recipe if fp8 else None,
        pruned_from=begun_from.pruned_from if begun_from else None,
        padding=begun_from.padding if begun_from else 0,
        chat_template=plan.template.jinja if plan.template else begun_from.chat_template if begun_from else None,
        expanded_from=begun_from.expanded_from if begun_from else None,
        provenance=plan.provenance,
    )
