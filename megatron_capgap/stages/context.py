"""What every stage does before its own work: devices, ranks, data, weights, the run directory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_capgap.checkpoint import loader
from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.checkpoint.run_directory import begin_training_run
from megatron_capgap.checkpoint.saver import Saver
from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.loader import LoadedConfig, changes, dump
from megatron_capgap.config.schema import Config, Layout
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.devices import Device
from megatron_capgap.distillation.transfer import TeacherStates
from megatron_capgap.distributed import collectives, launcher, parallel_context
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.distributed.role_groups import RoleGroups
from megatron_capgap.distributed.watchdog import Watchdog
from megatron_capgap.losses import Loss, language_model_loss
from megatron_capgap.models import gpt, memory, projections, size
from megatron_capgap.models.fp8_weights import cast_params_to_fp8
from megatron_capgap.models.sharded_state import initialise
from megatron_capgap.runtime.logging import RunLogger, count
from megatron_capgap.runtime.metrics import drop_metrics_after
from megatron_capgap.runtime.run_lock import RunLock
from megatron_capgap.stages import check, datasets
from megatron_capgap.stages.resolve import ResolvedConfig, resolve
from megatron_capgap.training import optimizer
from megatron_capgap.training.checkpointing import resume
from megatron_capgap.training.neftune import Neftune
from megatron_capgap.training.run import CheckpointPolicy, Run, RunCosts, TrainingData, TrainingObjective
from megatron_capgap.training.step import LossFunction

_RESOLVED = "resolved.yaml"


@dataclass(frozen=True)
class StageContext:
    """What a stage stands on once everything was checked."""

    resolved: ResolvedConfig
    device: Device
    rank: int
    """This process among all of the job."""
    parallel: ParallelContext
    roles: RoleGroups | None
    """Between the student's and the teacher's ranks, where they are not the same."""
    memory_at_start: int
    """Peak bytes of this process before it built a model."""
    stop_at: float | None
    """Of `time.monotonic`: when to save and end before the work is done; None for never."""
    log: RunLogger
    lock: RunLock
    """Held by rank 0."""
    watchdog: Watchdog
    """Says where this rank is."""

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.resolved.config

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return Path(self.config.run_dir)


@contextmanager
def stage_context(loaded: LoadedConfig, stage: str, environment: Environment, device: Device) -> Iterator[StageContext]:
    """Checks everything, joins the ranks, opens the run directory; leaves the process groups at the end. Collective.

    A run directory that was made here goes again where the stage fails before it has called `commit_run_dir`.

    Raises:
        UserError: on every rank alike.
    """
    config = loaded.config
    minutes = config.train.exit_after_minutes
    stop_at = None if minutes is None else time.monotonic() + 60.0 * minutes
    resolved = resolve(loaded, stage, environment.world, device.capability)
    timeout, cut, roles = config.runtime.timeout_seconds, config.student.layout, None
    if resolved.student_world < resolved.world:
        roles = RoleGroups(environment, device, derived.teacher_ranks(config, resolved.world), timeout)
        watchdog = roles.watchdog
    else:
        watchdog = Watchdog(
            launcher.init_process_group(environment, device, timeout), environment.rank, environment.world, timeout
        )
    log, lock = None, RunLock(Path(config.run_dir))
    new = _missing_parents(Path(config.run_dir)) if environment.rank == 0 else []

    def open_run_dir() -> tuple[list[str], int | None]:
        return collectives.run_on_rank0(lambda: _open_run_dir(resolved, lock))

    try:
        warnings, steps = [], config.train.steps
        if roles is None:
            warnings, steps = open_run_dir()
        elif roles.is_teacher:
            cut = derived.teacher_layout(config)
            roles.barrier_with_errors(lambda: None)
        else:
            warnings, steps = roles.barrier_with_errors(open_run_dir)
        resolved = datasets.with_steps(resolved, steps)
        parallel = parallel_context.build(cut, config.seed, timeout)
        log = RunLogger(Path(config.run_dir), environment.rank == 0, config.runtime.tensorboard)
        for warning in warnings:
            log.warning(warning)
        _log_summary(log, resolved, device)
        memory_at_start = device.peak_memory()
        watchdog.activity = stage
        yield StageContext(
            resolved, device, environment.rank, parallel, roles, memory_at_start, stop_at, log, lock, watchdog
        )
    except BaseException as error:
        lock.release()
        _remove_if_uncommitted(new)
        if not isinstance(error, UserError):
            watchdog.report(error)
            raise  # one rank alone: closing the groups could wait for the others and hide the reason
        error.raised_on_all_ranks = True
        watchdog.stop()
        _close(log)
        raise
    lock.release()
    watchdog.stop()
    _close(log)


def _close(log: RunLogger | None) -> None:
    if log is not None:
        log.close()
    parallel_context.destroy()
    launcher.destroy_process_group()


def build_student(ctx: StageContext, *, trains: bool = True) -> list[torch.nn.Module]:
    """The student's chunks on this rank, from its checkpoint or from random weights, with projections where layers of
    another width are matched. Collective."""
    resolved, config = ctx.resolved, ctx.config
    precision = derived.student_precision(config)
    chunks = gpt.build(
        resolved.student,
        ctx.parallel,
        precision,
        ctx.device,
        sequence_length=config.data.sequence_length,
        dropout=config.train.dropout,
        masked=resolved.template is not None,
    )
    if resolved.teacher is not None:
        pairs = derived.projected_pairs(config, resolved.student, resolved.teacher)
        projections.add(chunks, pairs, resolved.teacher.hidden)
    if resolved.student_source is not None:
        loader.load_weights(resolved.student_source.folder, chunks, ctx.parallel)
    initialise(
        chunks, resolved.student, ctx.parallel, config.seed, only_projections=resolved.student_source is not None
    )
    cast_params_to_fp8(chunks, precision, backward=trains, masters=trains)
    return chunks


def language_model_run(ctx: StageContext) -> Run:
    """The run of a student that has no teacher. Collective."""
    vocab_size, parallel = ctx.resolved.student.vocab, ctx.parallel

    def loss(hidden: Tensor, head: Tensor, batch: MicroBatch) -> Loss:
        return language_model_loss(
            hidden.flatten(0, 1),
            head,
            *batch.flat(),
            vocab_size=vocab_size,
            group=parallel.groups.tp,
            sequence_parallel=parallel.layout.sequence,
        )

    return training_run(ctx, build_student(ctx), TrainingObjective(lambda batches, teacher_states: loss))


def training_run(ctx: StageContext, student: list[torch.nn.Module], objective: TrainingObjective) -> Run:
    """Optimizer and data, ready for the loop, where the run's newest checkpoint left them; commits the run directory.
    Collective.

    Args:
        ctx: of the stage.
        student: its chunks on this rank.
        objective: what is minimised.
    """
    config, resolved = ctx.config, ctx.resolved
    chunks = optimizer.wrap(student, ctx.parallel, derived.student_precision(config))
    checkpointing = config.checkpoint
    saver = Saver(
        ctx.run_dir,
        checkpointing.keep,
        async_save=checkpointing.async_save,
        timeout_seconds=config.runtime.timeout_seconds,
    )
    run = Run(
        config=config,
        run_dir=ctx.run_dir,
        device=ctx.device,
        parallel=ctx.parallel,
        chunks=chunks,
        optimizer=optimizer.build(chunks, config, ctx.device),
        data=TrainingData(
            train=datasets.open_training(resolved),
            valid=datasets.open_validation(resolved),
            vocab_size=resolved.student.vocab,
            byte_lengths=padded_byte_lengths(resolved),
            global_batch=resolved.global_batch,
        ),
        objective=_with_neftune(ctx, student, objective),
        costs=_costs(ctx),
        checkpoints=CheckpointPolicy(saver, lambda done: checkpoint_metadata(ctx, done), ctx.lock.check_ownership),
        log=ctx.log,
        watchdog=ctx.watchdog,
        stop_at=ctx.stop_at,
    )
    run = resume(run)
    commit_run_dir(ctx, run.done)
    return run


def _costs(ctx: StageContext) -> RunCosts:
    config, resolved = ctx.config, ctx.resolved
    peak, models = config.runtime.peak_tflops, (resolved.student, resolved.teacher)
    on_cpu = ctx.device.name == "cpu"
    return RunCosts(
        flops_per_token=size.training_flops(*models, config.data.sequence_length),
        peak_flops=None if peak is None else peak * 1e12 * resolved.world,
        memory_at_start=ctx.memory_at_start,
        memory_estimate=memory.estimate(config, resolved.stage, *models, resolved.world, on_cpu=on_cpu).total,
    )


def _with_neftune(ctx: StageContext, student: list[torch.nn.Module], objective: TrainingObjective) -> TrainingObjective:
    """The objective, with noise on the student's embeddings where finetune.neftune_alpha asks for it."""
    alpha = ctx.resolved.finetune.neftune_alpha
    if not alpha:
        return objective
    neftune = Neftune(student, ctx.parallel, alpha, ctx.config.seed)

    def loss_function(batches: Sequence[MicroBatch], teacher_states: TeacherStates | None) -> LossFunction:
        neftune.start_batch(batches)
        return objective.loss_function(batches, teacher_states)

    return replace(objective, loss_function=loss_function)


def padded_byte_lengths(resolved: ResolvedConfig) -> torch.Tensor:
    """UTF-8 bytes of each token, float64 `[vocab]`; ids that the model has and the tokenizer lacks have none, and those
    that the tokenizer alone has are left out."""
    lengths = torch.zeros(resolved.student.vocab, dtype=torch.float64)
    known = torch.as_tensor(resolved.tokenizer.byte_lengths(), dtype=torch.float64)[: len(lengths)]
    lengths[: len(known)] = known
    return lengths


def commit_run_dir(ctx: StageContext, done: int = 0) -> None:
    """Everything is found and loaded: from here on the run directory speaks of this run. Collective.

    Args:
        ctx: what the stage stands on.
        done: steps that a training run has done before.
    """
    resolved, path = ctx.resolved, ctx.run_dir / _RESOLVED

    def write() -> list[str]:
        if resolved.stage != "evaluate":
            drop_metrics_after(ctx.run_dir, done)
            begin_training_run(ctx.run_dir)
        changed = changes(ctx.config, path) if done else []
        if not (done and done == ctx.config.train.steps and path.exists()):  # where nothing is left to be done
            dump(ctx.config, str(path))
        return changed

    if changed := collectives.run_on_rank0(write):
        ctx.log.info(f"not as at the last start: {'; '.join(changed)}")


def _open_run_dir(resolved: ResolvedConfig, lock: RunLock) -> tuple[list[str], int | None]:
    """Makes the run directory, checks the data and indexes it. Rank 0 only; what it raises reaches every rank.

    Returns:
        What the reader must be told: of a job that had the directory before, of the data; and the steps of the run.
    """
    config = resolved.config
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        place = resolved.loaded.location("run_dir")
        raise UserError(f"{place}: {run_dir} cannot be written ({error.strerror}); choose another run_dir") from error
    warning = lock.acquire()
    said = datasets.build_indices(resolved)
    return [*([warning] if warning else []), *resolved.remarks, *said], datasets.steps(resolved)


def _missing_parents(run_dir: Path) -> list[Path]:
    """The run directory and its parents as far as they are not there yet, innermost first."""
    return [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]


def _remove_if_uncommitted(new: list[Path]) -> None:
    """Removes the folders that this run made, unless the run has begun or others have put something into them."""
    if not new or (new[0] / _RESOLVED).exists():
        return
    shutil.rmtree(new[0], ignore_errors=True)
    with suppress(OSError):
        for folder in new[1:]:
            folder.rmdir()


def _log_summary(log: RunLogger, resolved: ResolvedConfig, device: Device) -> None:
    """The first lines of a run."""
    log.table(*device.component_table())
    for name, shape in (("student", resolved.student), ("teacher", resolved.teacher)):
        if shape is not None:
            total, inner = size.parameters(shape), size.non_embedding_parameters(shape)
            log.info(f"{name}: {count(total)} parameters, {count(inner)} without embeddings")
    for line in [*check.kept(resolved), *check.arithmetic(resolved)]:
        log.info(line)
    config = resolved.config
    tokens = resolved.global_batch * config.data.sequence_length
    log.info(f"{_layout_line('ranks', config.student.layout, resolved.student_world)}; {tokens} tokens a step")
    if resolved.stage == "finetune":
        log.info(f"{config.train.steps} steps; {resolved.finetune.epochs} epochs unless train.steps says otherwise")
    if derived.teacher_runs(config, resolved.stage):
        ranks = derived.teacher_ranks(config, resolved.world)
        where = "its own" if ranks.start else "all, in turn with the student"
        log.info(f"{_layout_line('the teacher', derived.teacher_layout(config), len(ranks))}; {where}")


def _layout_line(title: str, cut: Layout, ranks: int) -> str:
    data = derived.data_parallel(cut, ranks)
    return f"{title}: {ranks} = tensor {cut.tensor} x pipeline {cut.pipeline} x data {data}"


def checkpoint_metadata(ctx: StageContext, done: int) -> CheckpointMetadata:
    """What a checkpoint after `done` steps says of itself."""
    resolved, config = ctx.resolved, ctx.config
    samples = done * resolved.global_batch
    fp8 = derived.student_precision(config).fp8
    begun_from = resolved.student_source.meta if resolved.student_source else None
    return CheckpointMetadata(
        step=done,
        steps=config.train.steps or done,
        tokens=samples * config.data.sequence_length,
        model=resolved.student,
        tokenizer=config.data.tokenizer,
        tokenizer_fingerprint=resolved.tokenizer.fingerprint,
        stage=resolved.stage,
        seed=config.seed,
        ranks=loader.ranks(ctx.parallel),
        device=ctx.device.name,
        projections=derived.projection_names(config, resolved.student, resolved.teacher),
        sequence_length=config.data.sequence_length,
        fp8_recipe=fp8.recipe if fp8 else None,
        pruned_from=begun_from.pruned_from if begun_from else None,
        padding=begun_from.padding if begun_from else 0,
        chat_template=resolved.template.jinja if resolved.template else begun_from and begun_from.chat_template,
        expanded_from=begun_from.expanded_from if begun_from else None,
        lessons=resolved.provenance,
    )
