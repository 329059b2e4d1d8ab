"""What every stage does before its own work: devices, ranks, data, weights, the run directory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_capgap.checkpoint import store
from megatron_capgap.checkpoint.manifest import Manifest, begin_training_run
from megatron_capgap.checkpoint.saving import Saver
from megatron_capgap.config import derive
from megatron_capgap.config.errors import UserError
from megatron_capgap.config.load import Loaded, changes, dump
from megatron_capgap.config.schema import Config, Layout
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.losses import Loss, language_model_loss
from megatron_capgap.models import gpt, memory, projections, size
from megatron_capgap.models.fp8_weights import hold_in_fp8
from megatron_capgap.models.state import initialise
from megatron_capgap.runtime import launch, layout
from megatron_capgap.runtime.bridge import Bridge
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.launch import Environment
from megatron_capgap.runtime.layout import Grid
from megatron_capgap.runtime.lock import RunLock
from megatron_capgap.runtime.logging import Log, count, drop_metrics_after
from megatron_capgap.runtime.watch import Watch
from megatron_capgap.stages import check, material
from megatron_capgap.stages.resolve import Resolved, resolve
from megatron_capgap.training import optimizer
from megatron_capgap.training.loop import Run, resume
from megatron_capgap.training.noise import Noise
from megatron_capgap.training.step import LossFunction

_RESOLVED = "resolved.yaml"


@dataclass(frozen=True)
class Ground:
    """What a stage stands on once everything was checked."""

    resolved: Resolved
    device: Device
    rank: int
    """This process among all of the job."""
    grid: Grid
    bridge: Bridge | None
    """Between the student's and the teacher's ranks, where they are not the same."""
    memory_at_start: int
    """Peak bytes of this process before it built a model."""
    stop_at: float | None
    """Of `time.monotonic`: when to save and end before the work is done; None for never."""
    log: Log
    lock: RunLock
    """Held by rank 0."""
    watch: Watch
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
def ground(loaded: Loaded, stage: str, environment: Environment, device: Device) -> Iterator[Ground]:
    """Checks everything, joins the ranks, opens the run directory; leaves the process groups at the end. Collective.

    A run directory that was made here goes again where the stage fails before it has called `begin`.

    Raises:
        UserError: on every rank alike.
    """
    config = loaded.config
    minutes = config.train.exit_after_minutes
    stop_at = None if minutes is None else time.monotonic() + 60.0 * minutes
    resolved = resolve(loaded, stage, environment.world, device.capability)
    timeout, cut, bridge = config.runtime.timeout_seconds, config.student.layout, None
    if resolved.student_world < resolved.world:
        bridge = Bridge(environment, device, derive.teacher_ranks(config, resolved.world), timeout)
        watch = bridge.watch
    else:
        watch = Watch(launch.join(environment, device, timeout), environment.rank, environment.world, timeout)
    log, lock = None, RunLock(Path(config.run_dir))
    new = _missing_folders(Path(config.run_dir)) if environment.rank == 0 else []

    def open_run_dir() -> tuple[list[str], int | None]:
        return launch.on_first_rank(lambda: _open_run_dir(resolved, lock))

    try:
        warnings, steps = [], config.train.steps
        if bridge is None:
            warnings, steps = open_run_dir()
        elif bridge.teaches:
            cut = derive.teacher_layout(config)
            bridge.together(lambda: None)
        else:
            warnings, steps = bridge.together(open_run_dir)
        resolved = material.with_steps(resolved, steps)
        grid = layout.build(cut, config.seed, timeout)
        log = Log(Path(config.run_dir), environment.rank == 0, config.runtime.tensorboard)
        for warning in warnings:
            log.warn(warning)
        _introduce(log, resolved, device)
        memory_at_start = device.peak_memory()
        watch.place = stage
        yield Ground(resolved, device, environment.rank, grid, bridge, memory_at_start, stop_at, log, lock, watch)
    except BaseException as error:
        lock.release()
        _remove_unless_begun(new)
        if not isinstance(error, UserError):
            watch.explain(error)
            raise  # one rank alone: closing the groups could wait for the others and hide the reason
        error.on_every_rank = True
        watch.end()
        _close(log)
        raise
    lock.release()
    watch.end()
    _close(log)


def _close(log: Log | None) -> None:
    if log is not None:
        log.close()
    layout.release()
    launch.leave()


def student_chunks(ground: Ground, *, trains: bool = True) -> list[torch.nn.Module]:
    """The student's chunks on this rank, from its checkpoint or from random weights, with projections where layers of
    another width are matched. Collective."""
    resolved, config = ground.resolved, ground.config
    precision = derive.student_precision(config)
    chunks = gpt.build(
        resolved.student,
        ground.grid,
        precision,
        ground.device,
        sequence_length=config.data.sequence_length,
        dropout=config.train.dropout,
        masked=resolved.template is not None,
    )
    if resolved.teacher is not None:
        pairs = derive.projected_pairs(config, resolved.student, resolved.teacher)
        projections.add(chunks, pairs, resolved.teacher.hidden)
    if resolved.student_source is not None:
        store.load_weights(resolved.student_source.folder, chunks, ground.grid)
    initialise(chunks, resolved.student, ground.grid, config.seed, only_projections=resolved.student_source is not None)
    hold_in_fp8(chunks, precision, backward=trains, masters=trains)
    return chunks


def language_model_run(ground: Ground) -> Run:
    """The run of a student that has no teacher. Collective."""
    vocab_size, grid = ground.resolved.student.vocab, ground.grid

    def loss(hidden: Tensor, head: Tensor, batch: MicroBatch) -> Loss:
        return language_model_loss(
            hidden.flatten(0, 1),
            head,
            *batch.flat(),
            vocab_size=vocab_size,
            group=grid.groups.tp,
            sequence_parallel=grid.layout.sequence,
        )

    return training_run(ground, student_chunks(ground), lambda batches: loss)


def training_run(
    ground: Ground,
    student: list[torch.nn.Module],
    prepare: Callable[[Sequence[MicroBatch]], LossFunction],
    loss_of_layers: Callable[[], Loss] | None = None,
) -> Run:
    """Optimizer and data, ready for the loop, where the run's newest checkpoint left them; begins the run. Collective.

    Args:
        ground: what the stage stands on.
        student: its chunks on this rank.
        prepare: gives the loss of each global batch; a teacher runs in it.
        loss_of_layers: see `train_step`.
    """
    config, resolved = ground.config, ground.resolved
    peak = config.runtime.peak_tflops
    chunks = optimizer.wrap(student, ground.grid, derive.student_precision(config))
    run = Run(
        config=config,
        run_dir=ground.run_dir,
        device=ground.device,
        grid=ground.grid,
        chunks=chunks,
        optimization=optimizer.build(chunks, config, ground.device),
        train=material.open_training(resolved),
        valid=material.open_validation(resolved),
        vocab_size=resolved.student.vocab,
        byte_lengths=padded_byte_lengths(resolved),
        global_batch=resolved.global_batch,
        describe=lambda done: describe(ground, done),
        prepare=_with_noise(ground, student, prepare),
        loss_of_layers=loss_of_layers,
        largest=None,
        flops_a_token=size.training_flops(resolved.student, resolved.teacher, config.data.sequence_length),
        peak_flops=None if peak is None else peak * 1e12 * resolved.world,
        memory_at_start=ground.memory_at_start,
        memory_estimate=memory.estimate(
            config,
            resolved.stage,
            resolved.student,
            resolved.teacher,
            resolved.world,
            on_cpu=ground.device.name == "cpu",
        ).total,
        stop_at=ground.stop_at,
        log=ground.log,
        claim=ground.lock.claim,
        watch=ground.watch,
        saver=Saver(
            ground.run_dir,
            config.checkpoint.keep,
            beside=config.checkpoint.async_save,
            timeout_seconds=config.runtime.timeout_seconds,
        ),
    )
    run = resume(run)
    begin(ground, run.done)
    return run


def _with_noise(
    ground: Ground, student: list[torch.nn.Module], prepare: Callable[[Sequence[MicroBatch]], LossFunction]
) -> Callable[[Sequence[MicroBatch]], LossFunction]:
    """`prepare`, with noise on the student's embeddings where finetune.neftune_alpha asks for it."""
    alpha = ground.resolved.finetune.neftune_alpha
    if not alpha:
        return prepare
    noise = Noise(student, ground.grid, alpha, ground.config.seed)

    def prepare_noise_too(batches: Sequence[MicroBatch]) -> LossFunction:
        noise.begin(batches)
        return prepare(batches)

    return prepare_noise_too


def padded_byte_lengths(resolved: Resolved) -> torch.Tensor:
    """UTF-8 bytes of each token, float64 `[vocab]`; ids that the model has and the tokenizer lacks have none, and those
    that the tokenizer alone has are left out."""
    lengths = torch.zeros(resolved.student.vocab, dtype=torch.float64)
    known = torch.as_tensor(resolved.tokenizer.byte_lengths(), dtype=torch.float64)[: len(lengths)]
    lengths[: len(known)] = known
    return lengths


def begin(ground: Ground, done: int = 0) -> None:
    """Everything is found and loaded: from here on the run directory speaks of this run. Collective.

    Args:
        ground: what the stage stands on.
        done: steps that a training run has done before.
    """
    resolved, path = ground.resolved, ground.run_dir / _RESOLVED

    def write() -> list[str]:
        if resolved.stage != "evaluate":
            drop_metrics_after(ground.run_dir, done)
            begin_training_run(ground.run_dir)
        changed = changes(ground.config, path) if done else []
        if not (done and done == ground.config.train.steps and path.exists()):  # where nothing is left to be done
            dump(ground.config, str(path))
        return changed

    if changed := launch.on_first_rank(write):
        ground.log.say(f"not as at the last start: {'; '.join(changed)}")


def _open_run_dir(resolved: Resolved, lock: RunLock) -> tuple[list[str], int | None]:
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
        place = resolved.loaded.place("run_dir")
        raise UserError(f"{place}: {run_dir} cannot be written ({error.strerror}); choose another run_dir") from error
    warning = lock.take()
    said = material.build(resolved)
    return [*([warning] if warning else []), *resolved.remarks, *said], material.steps(resolved)


def _missing_folders(run_dir: Path) -> list[Path]:
    """The run directory and its parents as far as they are not there yet, innermost first."""
    return [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]


def _remove_unless_begun(new: list[Path]) -> None:
    """Removes the folders that this run made, unless the run has begun or others have put something into them."""
    if not new or (new[0] / _RESOLVED).exists():
        return
    shutil.rmtree(new[0], ignore_errors=True)
    with suppress(OSError):
        for folder in new[1:]:
            folder.rmdir()


def _introduce(log: Log, resolved: Resolved, device: Device) -> None:
    """The first lines of a run."""
    log.parts(device)
    for name, shape in (("student", resolved.student), ("teacher", resolved.teacher)):
        if shape is not None:
            total, inner = size.parameters(shape), size.non_embedding_parameters(shape)
            log.say(f"{name}: {count(total)} parameters, {count(inner)} without embeddings")
    for line in [*check.kept(resolved), *check.arithmetic(resolved)]:
        log.say(line)
    config = resolved.config
    tokens = resolved.global_batch * config.data.sequence_length
    log.say(f"{_cut('ranks', config.student.layout, resolved.student_world)}; {tokens} tokens a step")
    if resolved.stage == "finetune":
        log.say(f"{config.train.steps} steps; {resolved.finetune.epochs} epochs unless train.steps says otherwise")
    if derive.teacher_runs(config, resolved.stage):
        ranks = derive.teacher_ranks(config, resolved.world)
        where = "its own" if ranks.start else "all, in turn with the student"
        log.say(f"{_cut('the teacher', derive.teacher_layout(config), len(ranks))}; {where}")


def _cut(title: str, cut: Layout, ranks: int) -> str:
    data = derive.data_parallel(cut, ranks)
    return f"{title}: {ranks} = tensor {cut.tensor} x pipeline {cut.pipeline} x data {data}"


def describe(ground: Ground, done: int) -> Manifest:
    """What a checkpoint after `done` steps says of itself."""
    resolved, config = ground.resolved, ground.config
    samples = done * resolved.global_batch
    fp8 = derive.student_precision(config).fp8
    begun_from = resolved.student_source.manifest if resolved.student_source else None
    return Manifest(
        step=done,
        steps=config.train.steps or done,
        tokens=samples * config.data.sequence_length,
        model=resolved.student,
        tokenizer=config.data.tokenizer,
        tokenizer_fingerprint=resolved.tokenizer.fingerprint,
        stage=resolved.stage,
        seed=config.seed,
        ranks=store.ranks(ground.grid),
        device=ground.device.name,
        projections=derive.projection_names(config, resolved.student, resolved.teacher),
        sequence_length=config.data.sequence_length,
        fp8_recipe=fp8.recipe if fp8 else None,
        pruned_from=begun_from.pruned_from if begun_from else None,
        padding=begun_from.padding if begun_from else 0,
        chat_template=resolved.template.jinja if resolved.template else begun_from and begun_from.chat_template,
        expanded_from=begun_from.expanded_from if begun_from else None,
        lessons=resolved.lessons,
    )
