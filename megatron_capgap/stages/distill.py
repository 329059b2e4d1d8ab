"""Stage distill: trains a student on a teacher's next-token distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from megatron_capgap.checkpoint import loader
from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.data.prefetch import Prefetcher
from megatron_capgap.devices import Device
from megatron_capgap.distillation import transfer_plan
from megatron_capgap.distillation.disjoint import StudentPeer, run_teacher_ahead
from megatron_capgap.distillation.hidden_state_hooks import HiddenStateMatching
from megatron_capgap.distillation.offload import HostOffload
from megatron_capgap.distillation.teacher import FrozenTeacher, freeze
from megatron_capgap.distillation.transfer import (
    HiddenStateTransfer,
    PendingTransfer,
    States,
    TeacherStates,
    Transport,
    batched_p2p,
)
from megatron_capgap.distributed import collectives, parallel_context, process_group
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.distributed.role_groups import FAILED, RoleGroups
from megatron_capgap.distributed.signals import StopRequest, exit_code, reason_of
from megatron_capgap.losses import DistillationObjective, Loss, TeacherHidden, distillation_loss
from megatron_capgap.models import gpt, size
from megatron_capgap.models.fp8_weights import cast_params_to_fp8
from megatron_capgap.models.gpt import DTYPES, unwrap
from megatron_capgap.stages import context, datasets, record
from megatron_capgap.stages.plan import DistillationPlan
from megatron_capgap.training.loop import train
from megatron_capgap.training.run import TrainingObjective, TrainingRun
from megatron_capgap.training.step import LossFunction

DistillationContext = context.StageContext[DistillationPlan]


def run(plan: DistillationPlan, environment: Environment, device: Device) -> int:
    """Distils; returns the exit code."""
    with context.stage_context(plan, environment, device) as ctx:
        roles = ctx.roles
        if roles is None:
            reason = train(colocated_run(ctx))
            _write_record(ctx)
            return exit_code(reason)
        with abort_on_rank_failure(ctx):
            return exit_code(teacher_loop(ctx, roles) if roles.is_teacher else student_loop(ctx, roles))


def _write_record(ctx: DistillationContext) -> None:
    """Writes the run's record for the law. Collective over the student's ranks."""
    ctx.log.info(collectives.run_on_rank0(lambda: record.write(ctx.plan)))


def colocated_run(ctx: DistillationContext) -> TrainingRun:
    """Run with a colocated teacher; without a teacher if the objective does not use it. Collective."""
    if not derived.teacher_runs(ctx.config, ctx.plan.stage):
        ctx.log.info("the objective does not use the teacher: it is not loaded, the loss is the cross-entropy alone")
        return context.language_model_run(ctx)
    teacher = load_teacher(ctx)
    return distillation_run(ctx, load_teacher_lm_head(ctx, teacher), _colocated_teacher(ctx, teacher))


def distillation_run(
    ctx: DistillationContext, teacher_lm_head: Tensor | None, teacher_forward: Callable[[int], TeacherStates]
) -> TrainingRun:
    """The student's training run. Collective over its ranks.

    Args:
        ctx: context of the stage.
        teacher_lm_head: `[v/tp, h_teacher]`, sharded as the student's LM head, on the student's last stage.
        teacher_forward: from the index of a global batch's first sample to the teacher's states that this rank needs.
    """
    student = context.build_student(ctx)
    objective = DistillationObjective(**vars(ctx.config.objective))
    plan, parallel = ctx.plan, ctx.parallel
    # Both models share one tokenizer; vocabulary rows that only one model has are excluded from the divergence.
    vocab_size = min(plan.student.vocab, plan.teacher.vocab)
    into_main_grad = context.adds_into_main_grad(ctx.device)
    matching = HiddenStateMatching(student, parallel, objective.matching)

    def loss_function(batches: Sequence[MicroBatch], teacher_states: TeacherStates | None) -> LossFunction:
        assert teacher_states is not None, "the objective has a teacher_forward"
        matching.start_batch(batches, teacher_states)

        def loss(hidden: Tensor, lm_head: Tensor, batch: MicroBatch) -> Loss:
            assert teacher_lm_head is not None, "only the last stage computes the loss, and it has the head"
            # Popped, so that the teacher's states of a micro-batch are freed as soon as its loss is computed.
            hidden_of_teacher = teacher_states.pop(transfer_plan.FINAL_HIDDEN, batch.sample_ids).flatten(0, 1)
            return distillation_loss(
                hidden.flatten(0, 1),
                lm_head,
                TeacherHidden(hidden=hidden_of_teacher, head=teacher_lm_head),
                *batch.flat(),
                objective=objective,
                vocab_size=vocab_size,
                group=parallel.groups.tp,
                sequence_parallel=parallel.layout.sequence,
                into_main_grad=into_main_grad,
            )

        return loss

    return context.training_run(
        ctx,
        student,
        TrainingObjective(
            loss_function,
            teacher_forward,
            matching.loss if objective.matching else None,
            objective.report,
            teacher_one_step_early=ctx.roles is None,
        ),
    )


def load_teacher(ctx: DistillationContext) -> FrozenTeacher:
    """Builds the teacher in its own layout, without LM head, and loads its weights. Collective over its ranks."""
    plan, config = ctx.plan, ctx.config
    source, shape = plan.teacher_source, plan.teacher
    precision = derived.teacher_precision(config)
    parallel = parallel_context.build_additional(
        ctx.parallel, derived.teacher_layout(config), config.runtime.timeout_seconds
    )
    with parallel.activate():
        chunks = gpt.build(
            shape,
            parallel,
            precision,
            ctx.device,
            sequence_length=config.data.sequence_length,
            virtual=False,
            lm_head=False,
            use_attention_mask=plan.template is not None,
        )
        loader.load_weights(source.folder, chunks, parallel)
        cast_params_to_fp8(chunks, precision)
    freeze(chunks)
    weights: AbstractContextManager[None] = nullcontext()
    if ctx.plan.teacher_config.offload:
        weights = HostOffload((p for chunk in chunks for p in chunk.parameters()), ctx.device.torch_device)
    placement, _ = transfer_plan.model_placements(config, plan.world)
    return FrozenTeacher(
        chunks, parallel, shape, derived.teacher_micro_batch(config), placement.samples[parallel.dp_rank], weights
    )


def load_teacher_lm_head(ctx: DistillationContext, teacher: FrozenTeacher | None) -> Tensor | None:
    """Loads the teacher's LM head, sharded as the student's. Collective over the student's ranks.

    Args:
        ctx: context of the stage.
        teacher: the teacher on this rank; None on ranks without one.

    Returns:
        `[v/tp, h_teacher]` on the student's last stage, with v padded as the student's; None, or an unused tensor, on
        other stages.
    """
    source, shape, config = ctx.plan.teacher_source, ctx.plan.teacher, ctx.config
    if source.meta.step < source.meta.steps:
        done = f"step {source.meta.step} of {source.meta.steps}"
        ctx.log.info(f"teacher: {source.folder} is at {done}: its run is incomplete")
    teacher_layout, tensor = derived.teacher_layout(config), ctx.parallel.layout.tensor
    lm_head_shape = replace(shape, vocab=ctx.plan.student.vocab)  # the student's vocabulary rows
    same_rows = size.padded_vocab(shape.vocab, tensor) == size.padded_vocab(lm_head_shape.vocab, tensor)
    same_shards = teacher_layout.pipeline == 1 and teacher_layout.tensor == tensor and same_rows
    if teacher and shape.tied_embeddings and same_shards and not ctx.plan.teacher_config.offload:
        return unwrap(teacher.chunks[0]).embedding.word_embeddings.weight  # already on every rank
    dtype = DTYPES[derived.teacher_precision(config).compute]
    device = ctx.device.torch_device
    return loader.load_head(source.folder, lm_head_shape, ctx.parallel, dtype, device, verified=teacher is not None)


def _hidden_state_transfer(ctx: DistillationContext, transport: Transport) -> HiddenStateTransfer:
    """This rank's part of the hidden-state transfer."""
    plan, config = ctx.plan, ctx.config
    streams = transfer_plan.streams(*transfer_plan.model_placements(config, plan.world), _routes(ctx), ctx.rank)
    dtype, device = DTYPES[derived.teacher_precision(config).compute], ctx.device.torch_device
    on_wait = ctx.watchdog.set_waiting_for
    return HiddenStateTransfer(
        streams, ctx.rank, width=plan.teacher.hidden, dtype=dtype, device=device, transport=transport, on_wait=on_wait
    )


def _routes(ctx: DistillationContext) -> list[transfer_plan.StageRoute]:
    return transfer_plan.routes(ctx.config, ctx.plan.teacher, ctx.plan.student)


def make_teacher_forward(ctx: DistillationContext, teacher: FrozenTeacher) -> Callable[[int], States]:
    """From the index of a global batch's first sample to the teacher's output states on this rank."""
    samples = datasets.open_training(ctx.plan)
    layers = [route.key for route in _routes(ctx) if route.key != transfer_plan.FINAL_HIDDEN]
    size, steps, host = ctx.plan.global_batch, ctx.config.train.steps, torch.device("cpu")
    assert steps is not None, "guaranteed by config.loader"
    batches = Prefetcher(lambda step: teacher.micro_batches(samples, step * size, host), ctx.device.upload, steps)

    def forward(first_sample: int) -> States:
        with ctx.device.span("teacher forward"):
            return teacher.forward(batches.take(first_sample // size), layers)

    return forward


def _colocated_teacher(ctx: DistillationContext, teacher: FrozenTeacher) -> Callable[[int], TeacherStates]:
    """Teacher forward and transfer on ranks that teacher and student share."""
    transfer, forward = _hidden_state_transfer(ctx, batched_p2p), make_teacher_forward(ctx, teacher)

    def forward_and_transfer(first_sample: int) -> TeacherStates:
        states = forward(first_sample)
        with ctx.device.span("hand-off"):
            return TeacherStates(transfer.start(states, first_sample).wait())

    return forward_and_transfer


def student_loop(ctx: DistillationContext, roles: RoleGroups) -> str | None:
    """Runs the student's ranks, with a disjoint teacher; returns the reason to stop, as `train`."""
    assert ctx.config.train.steps is not None, "guaranteed by config.loader"
    student_peer = StudentPeer(
        roles,
        _hidden_state_transfer(ctx, roles.start_send_recv),
        batch_size=ctx.plan.global_batch,
        steps=ctx.config.train.steps,
        ahead=ctx.plan.teacher_config.ahead,
    )

    def receive(first_sample: int) -> TeacherStates:
        with ctx.device.span("hand-off"):
            return student_peer.receive_teacher_states(first_sample)

    teacher_lm_head = roles.barrier_with_errors(lambda: load_teacher_lm_head(ctx, None))
    # The run directory is committed after the teacher is loaded.
    run = roles.barrier_with_errors(lambda: distillation_run(ctx, teacher_lm_head, receive))
    student_peer.start(run.steps_done)
    failed: UserError | None = None
    reason = None
    try:
        reason = train(replace(run, all_reduce_max=student_peer.all_reduce_max))
        _write_record(ctx)
    except UserError as error:
        failed = error
        student_peer.abort(error)
    student_peer.drain()
    if failed is not None:
        raise failed
    return reason


def teacher_loop(ctx: DistillationContext, roles: RoleGroups) -> str | None:
    """Runs the ranks of a disjoint teacher; returns the reason to stop, as `train`."""
    batch_size, last = ctx.plan.global_batch, ctx.config.train.steps
    assert last is not None, "guaranteed by config.loader"
    transfer = _hidden_state_transfer(ctx, roles.start_send_recv)
    teacher = roles.barrier_with_errors(lambda: load_teacher(ctx))
    forward = roles.barrier_with_errors(lambda: make_teacher_forward(ctx, teacher))
    ctx.log.open_rank_log()  # the student has committed the run directory

    def run_teacher_step(step: int) -> PendingTransfer:
        first_sample = step * batch_size
        ctx.watchdog.activity = f"teacher forward of step {step + 1}"
        states = forward(first_sample)
        with ctx.device.span("hand-off"):
            return transfer.start(states, first_sample)

    # Only the student knows its step: it may resume from an earlier checkpoint.
    done = roles.start_all_reduce_max(0).wait()
    with StopRequest(ctx.device.torch_device) as stop:
        steps, ahead = range(done, last), ctx.plan.teacher_config.ahead
        end = run_teacher_ahead(steps, ahead, run_teacher_step, lambda: roles.start_all_reduce_max(stop.seen))
    if end == FAILED:
        raise roles.peer_error()
    return reason_of(end)


@contextmanager
def abort_on_rank_failure(ctx: DistillationContext) -> Iterator[None]:
    """If a rank fails, all ranks report the failed rank and the transfer that waited for it, and exit.

    The process is aborted: destroying process groups with an operation that waits for a failed rank would block.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        ctx.watchdog.report(error)
        ctx.log.record_error(error)
        process_group.abort(error)
