"""Training loop: read, teacher forward, student step, log, save, evaluate; until the last step, a signal or the time
limit."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_capgap.checkpoint import run_directory
from megatron_capgap.common.errors import UserError
from megatron_capgap.data.batch import MicroBatch, global_batch_samples, micro_batches
from megatron_capgap.data.prefetch import Prefetcher
from megatron_capgap.devices import Device
from megatron_capgap.distillation.transfer import TeacherStates
from megatron_capgap.distributed import collectives, process_group
from megatron_capgap.distributed.signals import StopRequest
from megatron_capgap.models.fp8_scales import DelayedScales
from megatron_capgap.runtime.logging import ThroughputMeter, count
from megatron_capgap.runtime.metrics import evaluation_after
from megatron_capgap.training import early_stopping
from megatron_capgap.training.checkpointing import finish_saving_on_error, save, warn_if_save_failed
from megatron_capgap.training.early_stopping import EarlyStopping
from megatron_capgap.training.evaluate import evaluate
from megatron_capgap.training.profiling import StepProfiler
from megatron_capgap.training.rank_exchange import RankExchange
from megatron_capgap.training.run import TrainingRun
from megatron_capgap.training.step import BadBatch, StepResult, train_step
from megatron_capgap.training.step_timer import StepTimer

_GC_STEPS = 50


def train(run: TrainingRun) -> str | None:
    """Trains from the run's current step to its last one, or until a signal, the time limit or early stopping
    (finetune.patience) ends it at a step boundary. Collective.

    Returns:
        The reason to stop before the end, as `StopRequest` names it; None if the run is complete.
    """
    config, log, steps = run.config, run.log, run.config.train.steps
    assert steps is not None
    done, skipped = run.steps_done, run.steps_skipped
    stopping = early_stopping.restore(run.run_dir, config.finetune.patience if config.finetune else None, done)
    if done and _evaluation_is_missing(run, done):
        _evaluate(run, done, skipped, stopping, saved=True)  # the run was stopped between saving and evaluating
    if done >= steps or stopping.exhausted:
        _log_nothing_to_do(run, done, stopping)
        return None
    meter, timer = ThroughputMeter(run.costs.flops_per_token), StepTimer(run.device)
    lost = lambda: _lost_steps(run, done)  # noqa: E731 (reads `done` when it is called)
    stop_request = StopRequest(run.device.torch_device, run.all_reduce_max, run.stop_at, lost)
    exchange = RankExchange(stop_request, timer, run.device)
    data = Prefetcher(lambda done: read_global_batch(run, done), run.device.upload, steps)
    log.bar(done, steps)
    with stop_request as stop, finish_saving_on_error(run), _manual_gc(), StepProfiler(run, done) as profiler:
        teacher = TeacherForward(run)
        while done < steps and not stopping.exhausted:
            run.watchdog.activity = f"step {done + 1}, reading"
            profiler.start_step()
            meter.pause()  # evaluations, saves and traces are no part of a step
            timer.start()
            batches = data.take(done)
            timer.data_loaded()
            exchange.start(with_times=_is_logged(run, done + 1))
            result = student_step(run, done, skipped, batches, teacher, timer, exchange)
            done, skipped = done + 1, skipped + (result is None)
            run.device.between_steps()
            _collect_garbage(done)
            warn_if_save_failed(run, run.checkpoints.saver.poll)
            if result is not None:
                _log_step(run, done, result, meter, timer)
            # A teacher on its own ranks has no part in the student's exchange.
            reason, saved = stop.poll_all_ranks() if run.all_reduce_max else stop.reason, False
            if reason or _is_due(done, config.checkpoint.every, steps):
                saved = save(run, done, skipped, last=bool(reason) or done == steps)
            if _is_due(done, config.train.eval_every, steps) and not reason:
                saved = _evaluate(run, done, skipped, stopping, saved=saved, stop=stop)
                reason = stop.reason
                if reason and done < steps:
                    stop.poll_all_ranks()  # informs a teacher on its own ranks
            if reason:
                _stop(run, done, skipped, reason, saved=saved)
                return reason
    if not saved:  # stopped early
        save(run, done, skipped, last=True)
    run.checkpoints.saver.wait()
    _log_finished(run, done, stopping)
    return None


def read_global_batch(run: TrainingRun, done: int) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of step `done + 1`, in host memory; they depend on the seed and `done`
    only."""
    rows = micro_batches(
        run.data.train,
        global_batch_samples(done, run.data.global_batch),
        run.config.train.micro_batch,
        run.parallel.dp_rank,
        run.parallel.dp_size,
        torch.device("cpu"),
    )
    return list(rows)


class TeacherForward:
    """The teacher's hidden states of each global batch, computed one step early if the objective allows it."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._early: TeacherStates | None = None  # of the next step

    def states(self, done: int) -> TeacherStates | None:
        """What this rank needs of the teacher's states for step `done + 1`; None without a teacher. Collective."""
        early, self._early = self._early, None
        forward = self._run.objective.teacher_forward
        if early is not None or forward is None:
            return early
        return forward(done * self._run.data.global_batch)

    def run_early(self, done: int) -> None:
        """Computes the states for step `done + 1`, if there is one, within the step before. Collective."""
        objective, steps = self._run.objective, self._run.config.train.steps
        assert steps is not None
        if objective.teacher_forward is not None and objective.teacher_one_step_early and done < steps:
            self._early = objective.teacher_forward(done * self._run.data.global_batch)


def student_step(
    run: TrainingRun,
    done: int,
    skipped: int,
    batches: Sequence[MicroBatch],
    teacher: TeacherForward,
    timer: StepTimer,
    exchange: RankExchange,
) -> StepResult | None:
    """Step `done + 1`: forward, backward, update; and the teacher's forward pass for the next step. Collective.

    Returns:
        The result; None if the batch is bad and was skipped. Weights, optimizer and FP8 scales are then unchanged.

    Raises:
        UserError: more bad batches than train.max_skipped allows.
    """
    run.watchdog.activity = f"step {done + 1}"
    objective, scales = run.objective, DelayedScales(run.chunks)

    def before_reduction() -> None:
        timer.arrived()
        teacher.run_early(done + 1)

    states = teacher.states(done)
    try:
        with run.device.span("student step"):
            return train_step(
                run.chunks,
                run.parallel,
                run.optimizer,
                batches,
                objective.loss_function(batches, states),
                objective.matching_loss,
                report=objective.report,
                exchange=exchange,
                before_reduction=before_reduction,
                span=run.device.span,
                step=done + 1,
                clip_norm=run.config.optimizer.clip_norm,
                max_norm=run.config.train.max_grad_norm,
            )
    except BadBatch as bad:
        scales.restore()
        _skip_bad_batch(run, done + 1, skipped + 1, bad)
        return None


def _stop(run: TrainingRun, done: int, skipped: int, reason: str, *, saved: bool) -> None:
    """Ends the process before the run is complete: saves the state if needed, and records the outcome for the batch
    script."""
    if not saved:
        save(run, done, skipped, last=True)
    run.checkpoints.saver.wait()
    steps = run.config.train.steps
    run.log.info(f"stopped by {reason} after step {done} of {steps}; rerun the same command to continue")
    if run.log.is_rank0:
        process_group.write_outcome("stopped")


def _lost_steps(run: TrainingRun, done: int) -> str:
    """What is lost if the process ends now, in words."""
    saved = max(run_directory.steps_in(run.run_dir), default=0)
    if done <= saved:
        return f"ends at once; step {saved} is saved, nothing is lost but the step at work"
    lost = f"step {done} is" if done == saved + 1 else f"steps {saved + 1} to {done} are"
    after = f"the next start continues after step {saved}" if saved else "there is no checkpoint yet"
    return f"ends at once, without saving; {lost} lost, {after}"


@contextmanager
def _manual_gc() -> Iterator[None]:
    """Replaces automatic garbage collection, for the duration of the run, by `_collect_garbage`.

    Objects created at start-up are excluded: they live as long as the run, and scanning them takes a third of a second,
    also in every save, where Megatron-Core collects. A process that executes several runs may have frozen more objects.
    """
    automatic, frozen = gc.isenabled(), gc.get_freeze_count()
    if not frozen:
        gc.collect()
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if automatic:
            gc.enable()
        if not frozen:
            gc.unfreeze()


def _collect_garbage(done: int) -> None:
    """Collects garbage after the same steps on all ranks: collections at different steps delay the ranks in turn."""
    if done % _GC_STEPS == 0:
        gc.collect()


def _log_nothing_to_do(run: TrainingRun, done: int, stopping: EarlyStopping) -> None:
    why = f"{_no_improvement(stopping)}; raise finetune.patience" if stopping.exhausted else "raise train.steps"
    steps = done if stopping.exhausted else run.config.train.steps
    run.log.info(f"nothing to do: all {steps} steps are done; {why} to continue")


def _log_finished(run: TrainingRun, done: int, stopping: EarlyStopping) -> None:
    """The last line of a run."""
    used = peak_memory_line(run.device, run.costs.memory_at_start, run.costs.memory_estimate)
    folder, steps = f"{run.run_dir}/checkpoints", run.config.train.steps
    early = f"{steps} steps"
    if stopping.exhausted:
        early = f"early, after step {done} of {steps}, for {_no_improvement(stopping)}"
    step = done if stopping.patience is None else stopping.best_step
    run.log.info(f"finished: {early}, checkpoint {folder}/step_{step}; {used}")


def _no_improvement(stopping: EarlyStopping) -> str:
    best = f"{stopping.best_loss:.4f} after step {stopping.best_step}"
    return f"the held-out loss has not fallen below {best} in {stopping.waited} evaluations"


def peak_memory_line(device: Device, at_start: int, estimate: int) -> str:
    """A line with the measured peak memory of the rank that used most, and the estimate. Collective.

    Args:
        device: of the run.
        at_start: peak bytes of this process before it built a model.
        estimate: additional bytes that --check predicts.
    """
    above = collectives.all_reduce_max(device.peak_memory() - at_start, device.torch_device)
    return (
        f"peak memory of the fullest rank {above / 2**20:.0f} MiB above start-up, estimated {estimate / 2**20:.0f} MiB"
    )


def _skip_bad_batch(run: TrainingRun, step: int, skipped: int, bad: BadBatch) -> None:
    """Skips a bad batch: the step, its samples and its place in the schedule count, but nothing else changes.

    Raises:
        UserError: more bad batches than train.max_skipped allows.
    """
    max_skipped = run.config.train.max_skipped
    if skipped > max_skipped:
        if max_skipped == 0:
            raise bad
        raise UserError(
            f"{bad}; {max_skipped} bad batches were skipped before: train.max_skipped allows no more"
        ) from bad
    run.optimizer.lr_scheduler.step(1)
    run.log.record({"step": step, "bad_batch": bad.what, "samples": bad.samples, "skipped": skipped})
    run.log.warning(f"step {step}: {bad.what}; skipped samples {bad.samples}; {skipped} of at most {max_skipped} skips")


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _evaluation_is_missing(run: TrainingRun, done: int) -> bool:
    """Whether an evaluation is due after step `done` but missing in metrics.jsonl. Collective if one is due."""
    assert run.config.train.steps is not None
    if run.data.valid is None or not _is_due(done, run.config.train.eval_every, run.config.train.steps):
        return False
    return collectives.run_on_rank0(lambda: evaluation_after(run.run_dir, done) is None)


def _is_logged(run: TrainingRun, done: int) -> bool:
    return done % run.config.train.log_every == 0 or done == run.config.train.steps


def _log_step(run: TrainingRun, done: int, result: StepResult, meter: ThroughputMeter, timer: StepTimer) -> None:
    """Writes one line to metrics.jsonl and one to the console."""
    seconds, rate, flops = meter.update(result.tokens)
    steps, every = run.config.train.steps, run.config.train.log_every
    assert steps is not None, "set by stage_context"
    entry = {"step": done, "loss": result.loss, **result.loss_parts, "grad_norm": result.grad_norm, "lr": result.lr}
    speeds = {"tokens_per_second": round(rate, 1), "step_seconds": round(seconds, 6)}
    run.log.record({**entry, "tokens": result.tokens, **speeds, "peak_memory_bytes": timer.peak_memory})
    if not _is_logged(run, done):
        return
    speed = f"{count(rate)} tokens/s  {count(flops, 'FLOP/s')}"
    if run.costs.peak_flops is not None:
        speed += f" ({flops / run.costs.peak_flops:.1%} of the peak)"
    of_loss = result.loss_parts.items() if len(result.loss_parts) > 1 else ()
    line = "  ".join([f"loss {result.loss:.4f}", *(f"{name.replace('_', '-')} {part:.4f}" for name, part in of_loss)])
    line += f"  norm {result.grad_norm:.3f}  lr {result.lr:.2e}"
    parts = (line, speed, timer.summary(), f"left {meter.eta(steps - done)}")
    run.log.progress(done, steps, "  ".join(filter(None, parts)), every)


def _evaluate(
    run: TrainingRun, done: int, skipped: int, stopping: EarlyStopping, *, saved: bool, stop: StopRequest | None = None
) -> bool:
    """Evaluates on the held-out set and writes the loss to metrics.jsonl; with patience, keeps the best checkpoint.
    Collective.

    An evaluation stopped between two batches writes nothing; the resumed run starts with it.

    Args:
        run: the run.
        done: steps done.
        skipped: bad batches among them, which changed nothing.
        stopping: records the loss.
        saved: whether there is a checkpoint of this step.
        stop: may end the evaluation.

    Returns:
        Whether there is a checkpoint of this step now.
    """
    if run.data.valid is None:
        return saved
    run.watchdog.activity = f"the evaluation after step {done}"
    with run.device.span("evaluation"):
        result = evaluate(
            run.chunks,
            run.parallel,
            run.data.valid,
            vocab_size=run.data.vocab_size,
            byte_lengths=run.data.byte_lengths,
            micro_batch=run.config.train.micro_batch,
            global_batch=run.data.global_batch,
            batches=run.config.train.eval_batches,
            device=run.device.torch_device,
            should_stop=(lambda: stop.poll_default_group() is not None) if stop else (lambda: False),
        )
    if result is None:
        return saved
    run.log.record(result.entry(done))
    run.log.info(
        f"step {done}  valid loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
        f"{result.bits_per_byte:.4f} bits a byte  ({count(result.tokens)} tokens)"
    )
    # Decided by rank 0's value for all ranks.
    if stopping.update(done, collectives.run_on_rank0(lambda: result.loss)):
        if not saved:
            saved = save(run, done, skipped, last=False)
        warn_if_save_failed(run, run.checkpoints.saver.wait)  # `best` must refer to a checkpoint on disk
        collectives.run_on_rank0(lambda: run_directory.set_best(run.run_dir, done))
    return saved
