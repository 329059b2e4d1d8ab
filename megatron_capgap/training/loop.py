"""The loop: teach, step, record, evaluate, save, until the last step, a signal or the end of the time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_capgap.checkpoint import loader
from megatron_capgap.checkpoint import metadata as manifests
from megatron_capgap.checkpoint.metadata import CheckpointCorrupted, CheckpointMetadata
from megatron_capgap.checkpoint.saver import SaveFailed, Saver
from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import Config
from megatron_capgap.data.batch import MicroBatch, Samples, global_batch_samples, micro_batches
from megatron_capgap.devices import Device
from megatron_capgap.distributed import launcher
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.distributed.watchdog import Watchdog
from megatron_capgap.losses import Loss
from megatron_capgap.models.fp8_scales import DelayedScales
from megatron_capgap.runtime.logging import RunLogger, ThroughputMeter, count, evaluation_after
from megatron_capgap.runtime.signals import StopRequest
from megatron_capgap.training import early_stopping
from megatron_capgap.training.early_stopping import EarlyStopping
from megatron_capgap.training.evaluate import evaluate
from megatron_capgap.training.optimizer import OptimizerState
from megatron_capgap.training.step import BadBatch, LossFunction, StepResult, train_step
from megatron_capgap.training.step_timer import StepTimer


@dataclass(frozen=True)
class Run:
    """Everything a training run consists of."""

    config: Config
    run_dir: Path
    device: Device
    parallel: ParallelContext
    chunks: Sequence[DistributedDataParallel]
    optimizer: OptimizerState
    train: Samples
    valid: Samples | None
    vocab_size: int
    byte_lengths: Tensor
    """UTF-8 bytes of each token, float64 `[vocab]`."""
    global_batch: int
    checkpoint_metadata: Callable[[int], CheckpointMetadata]
    """From the number of steps done to what the checkpoint says of itself."""
    prepare: Callable[[Sequence[MicroBatch]], LossFunction]
    """From a global batch's micro-batches to the loss of each: where a teacher runs."""
    matching_loss: Callable[[], Loss] | None
    """What the global batch cost within the layers; see `train_step`."""
    all_reduce_max: Callable[[int], int] | None
    """The largest of a number over all ranks, where a teacher has some of its own. Collective, once a step."""
    flops_a_token: float
    peak_flops: float | None
    """FLOP/s of all ranks at best, where the configuration says it."""
    memory_at_start: int
    """Peak bytes of this process before the model was built: the interpreter, its libraries, communication buffers."""
    memory_estimate: int
    """Bytes that --check foresees above that."""
    stop_at: float | None
    """Of `time.monotonic`: when to save and end before the last step; None for never."""
    log: RunLogger
    check_ownership: Callable[[], None]
    """Raises UserError where the run directory is no longer this job's. Rank 0 only."""
    saver: Saver
    """Writes checkpoints."""
    watchdog: Watchdog
    """Says where this rank is."""
    done: int = 0
    """Steps that the state in `chunks` and `optimization` stands for."""
    skipped: int = 0
    """Those among them that were bad batches and changed nothing."""


def train(run: Run) -> None:
    """Trains from where the run stands to its last step, to the step boundary at which it is to stop, or to the end of
    finetune.patience. Collective."""
    config, log = run.config, run.log
    steps = config.train.steps
    assert steps is not None
    done, skipped = run.done, run.skipped
    patience = early_stopping.restore(run.run_dir, config.finetune.patience if config.finetune else None, done)
    if (
        done
        and _is_due(done, config.train.eval_every, steps)
        and not launcher.run_on_rank0(lambda: _has_evaluation(run, done))
    ):
        _evaluate(run, done, skipped, patience, saved=True)  # the run was stopped between saving and evaluating
    if done >= steps or patience.exhausted:
        why = f"{_no_improvement(patience)}; raise finetune.patience" if patience.exhausted else "raise train.steps"
        log.info(f"nothing to do: all {done if patience.exhausted else steps} steps are done; {why} to go on")
        return
    meter, pace = ThroughputMeter(run.flops_a_token), StepTimer(run.chunks, run.device)
    log.bar(done, steps)
    with (
        StopRequest(run.device.torch_device, run.all_reduce_max, run.stop_at) as stop,
        _finish_saving_on_error(run),
        _gc_frozen(),
    ):
        while done < steps and not patience.exhausted:
            try:
                result = one_step(run, done, pace)
            except BadBatch as bad:
                skipped += 1
                _skip_bad_batch(run, done + 1, skipped, bad)
                result = None
            done += 1
            run.device.between_steps()
            _warn_if_save_failed(run, run.saver.poll)
            if result is not None:
                _report(run, done, result, meter, pace)
            reason, saved = stop.agreed(), False
            if reason or _is_due(done, config.checkpoint.every, steps):
                saved = save(run, done, skipped, last=bool(reason) or done == steps)
            if _is_due(done, config.train.eval_every, steps) and not reason:
                saved = _evaluate(run, done, skipped, patience, saved=saved, stop=stop)
                reason = stop.reason
                if reason and done < steps:
                    stop.agreed()  # tells a teacher on ranks of its own
            meter.pause()
            if reason:
                _stop(run, done, skipped, reason, saved=saved)
                return
    if not saved:  # early
        save(run, done, skipped, last=True)
    run.saver.wait()
    _finish(run, done, patience)


def _stop(run: Run, done: int, skipped: int, reason: str, *, saved: bool) -> None:
    """The end of a start before that of the run: its state is on disk, and the batch script is told."""
    if not saved:
        save(run, done, skipped, last=True)
    run.saver.wait()
    steps = run.config.train.steps
    run.log.info(f"stopped by {reason} after step {done} of {steps}; the same command goes on from there")
    if run.log.is_rank0:
        launcher.write_outcome("stopped")


@contextmanager
def _finish_saving_on_error(run: Run) -> Iterator[None]:
    """What is being written gets done, also where a mistake that all ranks see ends the run."""
    try:
        yield
    except UserError:
        _warn_if_save_failed(run, run.saver.wait)
        raise


@contextmanager
def _gc_frozen() -> Iterator[None]:
    """Keeps what start-up has made out of garbage collection: it lives as long as the run, and looking through it takes
    a third of a second, in every save too, where Megatron-Core collects. Whoever runs several may have frozen more."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _finish(run: Run, done: int, patience: EarlyStopping) -> None:
    """The last line of a run."""
    used = peak_memory_line(run.device, run.memory_at_start, run.memory_estimate)
    folder, steps = f"{run.run_dir}/checkpoints", run.config.train.steps
    early = (
        f"early, after step {done} of {steps}, for {_no_improvement(patience)}"
        if patience.exhausted
        else f"{steps} steps"
    )
    step = done if patience.patience is None else patience.best_step
    run.log.info(f"finished: {early}, checkpoint {folder}/step_{step}; {used}")


def _no_improvement(patience: EarlyStopping) -> str:
    best = f"{patience.best_loss:.4f} after step {patience.best_step}"
    return f"the held-out loss has not fallen below {best} in {patience.waited} evaluations"


def peak_memory_line(device: Device, at_start: int, estimate: int) -> str:
    """What the fullest rank took, beside what was foreseen, in words. Collective.

    Args:
        device: of the run.
        at_start: peak bytes of this process before it built a model.
        estimate: bytes that --check foresees above that.
    """
    above = launcher.all_reduce_max(device.peak_memory() - at_start, device.torch_device)
    return (
        f"peak memory of the fullest rank {above / 2**20:.0f} MiB above start-up, estimated {estimate / 2**20:.0f} MiB"
    )


def one_step(run: Run, done: int, pace: StepTimer) -> StepResult:
    """Step number `done + 1` on its own samples; a BadBatch leaves the FP8 scales as they were, too. Collective."""
    pace.start()
    run.watchdog.activity = f"step {done + 1}, reading"
    batches = read_global_batch(run, done)
    pace.data_loaded()
    run.watchdog.activity = f"step {done + 1}"
    scales = DelayedScales(run.chunks)
    try:
        return train_step(
            run.chunks,
            run.parallel,
            run.optimizer,
            batches,
            run.prepare(batches),
            run.matching_loss,
            step=done + 1,
            clip_norm=run.config.optimizer.clip_norm,
            max_norm=run.config.train.max_grad_norm,
        )
    except BadBatch:
        scales.restore()
        raise


def _skip_bad_batch(run: Run, step: int, skipped: int, bad: BadBatch) -> None:
    """Leaves a bad batch out: the step counts, with its samples and its place in the schedule, but changes nothing.

    Raises:
        UserError: it is one too many.
    """
    most = run.config.train.max_skipped
    if skipped > most:
        if most == 0:
            raise bad
        raise UserError(f"{bad}; {most} bad batches were skipped before, train.max_skipped allows no more") from bad
    run.optimizer.schedule.step(1)
    run.log.record({"step": step, "bad_batch": bad.what, "samples": bad.samples, "skipped": skipped})
    run.log.warning(f"step {step}: {bad.what}; skipped samples {bad.samples}; {skipped} of {most} that may be skipped")


def read_global_batch(run: Run, done: int) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of the step after `done` steps: the seed and `done` alone decide them."""
    samples = global_batch_samples(done, run.global_batch)
    rows = micro_batches(
        run.train,
        samples,
        run.config.train.micro_batch,
        run.parallel.dp_rank,
        run.parallel.dp_size,
        run.device.torch_device,
    )
    return list(rows)


def resume(run: Run) -> Run:
    """Loads the run's newest checkpoint that is whole, if it has one. Collective.

    Returns:
        The run, knowing what its state stands for.

    Raises:
        UserError: the run has checkpoints, but none that is whole.
    """
    folders, reasons = launcher.run_on_rank0(lambda: manifests.candidates(run.run_dir))
    damaged: list[Path] = []
    for reason in reasons:
        run.log.warning(reason)
    for folder in folders:
        try:
            found = loader.load_training(folder, run.chunks, run.parallel, run.optimizer)
        except CheckpointCorrupted as error:
            reasons.append(str(error))
            damaged.append(folder)
            run.log.warning(f"{folder.name} is damaged and skipped: {error}")
            continue
        launcher.run_on_rank0(lambda: _make_latest(folder, damaged))  # noqa: B023 (called at once)
        run.log.info(f"resumed from {folder}: step {found.step} of {run.config.train.steps}")
        return replace(run, done=found.step, skipped=found.skipped)
    if error := manifests.no_readable_checkpoint(run.run_dir, reasons):
        raise error
    return run


def _make_latest(folder: Path, damaged: list[Path]) -> None:
    manifests.quarantine(damaged)
    manifests.set_latest(folder)


def save(run: Run, done: int, skipped: int, *, last: bool) -> bool:
    """Writes a checkpoint of the state after `done` steps. Collective.

    A full disk in the middle of a run is no reason to stop: it says so, and the next save tries again.

    Args:
        run: the run.
        done: its steps.
        skipped: those among them that changed nothing.
        last: there will be no next save.

    Returns:
        Whether it is on disk, or on its way.

    Raises:
        NotSaved: the last one could not be written.
        UserError: another job has taken the run directory over.
    """
    run.watchdog.activity = f"the save after step {done}"
    launcher.run_on_rank0(run.check_ownership)
    # Saving copies the optimizer's state, in the room that the activations leave.
    run.device.release_memory()
    meta = replace(run.checkpoint_metadata(done), skipped=skipped)
    _warn_if_save_failed(run, run.saver.wait)  # the one before
    try:
        run.saver.start(meta, run.chunks, run.parallel, run.optimizer)
        if last:
            run.saver.wait()
    except SaveFailed as error:
        if last:
            raise
        _log_save_failed(run, error)
        return False
    return True


def _warn_if_save_failed(run: Run, work: Callable[[], None]) -> None:
    """Says what could not be saved; the next save tries again."""
    try:
        work()
    except SaveFailed as error:
        _log_save_failed(run, error)


def _log_save_failed(run: Run, error: SaveFailed) -> None:
    run.log.warning(f"{error}; training goes on, the next save tries again")


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _has_evaluation(run: Run, done: int) -> bool:
    """Whether metrics.jsonl holds the evaluation after step `done`. Rank 0 only."""
    return run.valid is None or evaluation_after(run.run_dir, done) is not None


def _report(run: Run, done: int, result: StepResult, meter: ThroughputMeter, pace: StepTimer) -> None:
    """One line of metrics.jsonl, one on the console. Collective where the step is one to be shown."""
    rate, flops = meter.update(result.tokens)
    steps, every = run.config.train.steps, run.config.train.log_every
    entry = {"step": done, "loss": result.loss, **result.report, "grad_norm": result.grad_norm, "lr": result.lr}
    run.log.record({**entry, "tokens": result.tokens, "tokens_per_second": round(rate, 1)})
    if done % every and done != steps:
        return
    speed = f"{count(rate)} tokens/s  {count(flops, 'FLOP/s')}"
    if run.peak_flops is not None:
        speed += f" ({flops / run.peak_flops:.1%} of the peak)"
    line = f"loss {result.loss:.4f}  norm {result.grad_norm:.3f}  lr {result.lr:.2e}  {speed}  {pace.summary()}"
    run.log.progress(done, steps, f"{line}  left {meter.eta(steps - done)}", every)


def _evaluate(
    run: Run, done: int, skipped: int, patience: EarlyStopping, *, saved: bool, stop: StopRequest | None = None
) -> bool:
    """Loss on the held-out set, into metrics.jsonl; the best checkpoint is kept where there is patience. Collective.

    One that is stopped between two of its batches leaves nothing; the run that goes on begins with it.

    Args:
        run: the run.
        done, skipped: its steps, and those among them that changed nothing.
        patience: takes note of the loss.
        saved: whether there is a checkpoint of this step.
        stop: may end it.

    Returns:
        Whether there is one now.
    """
    if run.valid is None:
        return saved
    run.watchdog.activity = f"the evaluation after step {done}"
    result = evaluate(
        run.chunks,
        run.parallel,
        run.valid,
        vocab_size=run.vocab_size,
        byte_lengths=run.byte_lengths,
        micro_batch=run.config.train.micro_batch,
        global_batch=run.global_batch,
        batches=run.config.train.eval_batches,
        device=run.device.torch_device,
        halted=(lambda: stop.heard() is not None) if stop else (lambda: False),
    )
    if result is None:
        return saved
    run.log.record(result.entry(done))
    run.log.info(
        f"step {done}  valid loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
        f"{result.bits_per_byte:.4f} bits a byte  ({count(result.tokens)} tokens)"
    )
    # Of the first rank alone, whose number decides for all.
    if patience.update(done, launcher.run_on_rank0(lambda: result.loss)):
        if not saved:
            saved = save(run, done, skipped, last=False)
        _warn_if_save_failed(run, run.saver.wait)  # only what is on disk can be the best
        launcher.run_on_rank0(lambda: manifests.set_best(run.run_dir, done))
    return saved
