"""distill: a student learns a teacher's next-token distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from torch import Tensor

from megatron_capgap.checkpoint import store
from megatron_capgap.config import derive
from megatron_capgap.config.errors import UserError
from megatron_capgap.config.load import Loaded
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.distillation import plan
from megatron_capgap.distillation.ahead import work_ahead
from megatron_capgap.distillation.handoff import (
    HandOff,
    States,
    Taught,
    Transfer,
    Transport,
    within_world,
)
from megatron_capgap.distillation.matching import Matching
from megatron_capgap.distillation.offload import InHostMemory
from megatron_capgap.distillation.teacher import Teacher, freeze
from megatron_capgap.losses import DistillationObjective, Loss, TeacherHidden, distillation_loss
from megatron_capgap.models import gpt, size
from megatron_capgap.models.fp8_weights import hold_in_fp8
from megatron_capgap.models.gpt import DTYPES, unwrap
from megatron_capgap.runtime import launch, layout
from megatron_capgap.runtime.bridge import FAILED, Bridge
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.launch import Environment
from megatron_capgap.runtime.signals import StopRequest
from megatron_capgap.stages import common, material, record
from megatron_capgap.training.loop import Run, train
from megatron_capgap.training.step import LossFunction


def run(loaded: Loaded, environment: Environment, device: Device) -> int:
    """Distils; returns the exit code."""
    with common.ground(loaded, "distill", environment, device) as ground:
        bridge = ground.bridge
        if bridge is None:
            train(taught_in_turns(ground))
            _record(ground)
        elif bridge.teaches:
            with _all_or_none(ground):
                _work_ahead(ground, bridge)
        else:
            with _all_or_none(ground):
                _learn(ground, bridge)
    return 0


def _record(ground: common.Ground) -> None:
    """Leaves what the law reads of a run. Collective over the student's ranks."""
    ground.log.say(launch.on_first_rank(lambda: record.write(ground.resolved)))


def taught_in_turns(ground: common.Ground) -> Run:
    """The run of a student whose teacher shares all ranks with it; without the teacher where the objective does not use
    it. Collective."""
    if not derive.teacher_runs(ground.config, ground.resolved.stage):
        ground.log.say("the objective does not use the teacher: it is not loaded, the student learns from labels alone")
        return common.language_model_run(ground)
    teacher = open_teacher(ground)
    return learner(ground, open_head(ground, teacher), _in_turns(ground, teacher))


def learner(ground: common.Ground, head: Tensor | None, teach: Callable[[int], Taught]) -> Run:
    """The student's run. Collective over its ranks.

    Args:
        ground: what the stage stands on.
        head: the teacher's LM head `[v/tp, h_teacher]`, cut as the student is, on the student's last stage.
        teach: from a global batch's first sample to the teacher's states that this rank needs.
    """
    student = common.student_chunks(ground)
    objective = DistillationObjective(**vars(ground.config.objective))
    resolved, batch_size, grid = ground.resolved, ground.resolved.global_batch, ground.grid
    # The tokenizer is one; what a model's vocabulary has beyond it, the other's may lack, and counts on neither side.
    vocab_size = min(resolved.student.vocab, resolved.teacher.vocab)
    matching = Matching(student, grid, objective.matching)

    def prepare(batches: Sequence[MicroBatch]) -> LossFunction:
        taught = teach(batches[0].sample_ids[0] // batch_size * batch_size)
        matching.begin(batches, taught)

        def loss(hidden: Tensor, student_head: Tensor, batch: MicroBatch) -> Loss:
            # Taken, so that the teacher's states of a micro-batch go as soon as its loss is known.
            teaching = taught.take(plan.FINAL, batch.sample_ids).flatten(0, 1)
            return distillation_loss(
                hidden.flatten(0, 1),
                student_head,
                TeacherHidden(hidden=teaching, head=head),
                *batch.flat(),
                objective=objective,
                vocab_size=vocab_size,
                group=grid.groups.tp,
                sequence_parallel=grid.layout.sequence,
            )

        return loss

    return common.training_run(ground, student, prepare, matching.loss if objective.matching else None)


def open_teacher(ground: common.Ground) -> Teacher:
    """Builds the teacher in its own layout, without its LM head, and loads its weights. Collective over its ranks."""
    resolved, config = ground.resolved, ground.config
    source, shape = resolved.teacher_source, resolved.teacher
    assert source is not None and shape is not None, "resolve finds the teacher"
    precision = derive.teacher_precision(config)
    grid = layout.beside(ground.grid, derive.teacher_layout(config), config.runtime.timeout_seconds)
    with grid.active():
        chunks = gpt.build(
            shape,
            grid,
            precision,
            ground.device,
            sequence_length=config.data.sequence_length,
            virtual=False,
            head=False,
            masked=resolved.template is not None,
        )
        store.load_weights(source.folder, chunks, grid)
        hold_in_fp8(chunks, precision)
    freeze(chunks)
    weights = nullcontext()
    if config.teacher.offload:
        weights = InHostMemory((p for chunk in chunks for p in chunk.parameters()), ground.device.torch_device)
    side, _ = plan.sides(config, resolved.world)
    return Teacher(chunks, grid, shape, derive.teacher_micro_batch(config), side.samples[grid.data_rank], weights)


def open_head(ground: common.Ground, teacher: Teacher | None) -> Tensor | None:
    """The teacher's LM head, cut as the student is. Collective over the student's ranks.

    Args:
        ground: what the stage stands on.
        teacher: what this rank has of it.

    Returns:
        `[v/tp, h_teacher]` on the student's last stage, v as the student is padded; None, or what nothing reads, on the
        others.
    """
    source, shape, config = ground.resolved.teacher_source, ground.resolved.teacher, ground.config
    if source.manifest.step < source.manifest.steps:
        done = f"step {source.manifest.step} of {source.manifest.steps}"
        ground.log.say(f"teacher: {source.folder} is at {done}: its run is not finished")
    cut, tensor = derive.teacher_layout(config), ground.grid.layout.tensor
    wanted = replace(shape, vocab=ground.resolved.student.vocab)  # rows of the student's, whichever are the teacher's
    same_rows = size.padded_vocab(shape.vocab, tensor) == size.padded_vocab(wanted.vocab, tensor)
    alike = cut.pipeline == 1 and cut.tensor == tensor and same_rows and not config.teacher.offload
    if teacher and shape.tied_embeddings and alike:
        return unwrap(teacher.chunks[0]).embedding.word_embeddings.weight  # every rank has it already
    dtype = DTYPES[derive.teacher_precision(config).compute]
    device = ground.device.torch_device
    return store.load_head(source.folder, wanted, ground.grid, dtype, device, verified=teacher is not None)


def _hand_off(ground: common.Ground, transport: Transport) -> HandOff:
    """This rank's part in the hand-off."""
    resolved, config = ground.resolved, ground.config
    streams = plan.streams(*plan.sides(config, resolved.world), _routes(ground), ground.rank)
    dtype, device = DTYPES[derive.teacher_precision(config).compute], ground.device.torch_device
    say = ground.watch.waits_for
    return HandOff(
        streams, ground.rank, width=resolved.teacher.hidden, dtype=dtype, device=device, transport=transport, say=say
    )


def _routes(ground: common.Ground) -> list[plan.Route]:
    return plan.routes(ground.config, ground.resolved.teacher, ground.resolved.student)


def _speak(ground: common.Ground, teacher: Teacher) -> Callable[[int], States]:
    """From a global batch's first sample to what the teacher leaves of it on this rank."""
    device = ground.device.torch_device
    samples = material.open_training(ground.resolved)
    layers = [route.key for route in _routes(ground) if route.key != plan.FINAL]
    return lambda first_sample: teacher.hidden_states(teacher.read(samples, first_sample, device), layers)


def _in_turns(ground: common.Ground, teacher: Teacher) -> Callable[[int], Taught]:
    """Teacher and student share all ranks."""
    hand_off, speak = _hand_off(ground, within_world), _speak(ground, teacher)
    return lambda first_sample: Taught(hand_off.begin(speak(first_sample), first_sample).finish())


def _learn(ground: common.Ground, bridge: Bridge) -> None:
    """The student's ranks, with a teacher on others."""
    hand_off, batch_size = _hand_off(ground, bridge.begin), ground.resolved.global_batch
    steps, ahead = ground.config.train.steps, ground.config.teacher.ahead
    taken = agreed = 0  # batches of the teacher's, and ends of steps

    def teach(first_sample: int) -> Taught:
        nonlocal taken
        taken = first_sample // batch_size + 1
        return Taught(hand_off.begin({}, first_sample).finish())

    def largest(number: int) -> int:
        nonlocal agreed
        agreed += 1
        return bridge.agree(number).wait()

    head = bridge.together(lambda: open_head(ground, None))
    run = bridge.together(lambda: learner(ground, head, teach))  # the run begins once the teacher is there
    taken = agreed = run.done
    bridge.agree(run.done).wait()
    failed: UserError | None = None
    try:
        train(replace(run, largest=largest))
        _record(ground)
    except UserError as error:
        failed = error
        agreed += 1
        bridge.give_up(error)
    # What the teacher has begun: process groups with open work would not close.
    for step in range(taken, min(agreed + ahead, steps)):
        teach(step * batch_size)
    for _ in range(agreed, min(agreed + ahead, steps)):
        bridge.agree(0).wait()
    if failed is not None:
        raise failed


def _work_ahead(ground: common.Ground, bridge: Bridge) -> None:
    """The teacher's own ranks."""
    batch_size = ground.resolved.global_batch
    hand_off = _hand_off(ground, bridge.begin)
    teacher = bridge.together(lambda: open_teacher(ground))
    speak = bridge.together(lambda: _speak(ground, teacher))

    def teach(step: int) -> Transfer:
        first_sample = step * batch_size
        ground.watch.place = f"the teacher's turn in step {step + 1}"
        return hand_off.begin(speak(first_sample), first_sample)

    done = bridge.agree(0).wait()  # only the student knows: it may have had to go back to an earlier checkpoint
    with StopRequest(ground.device.torch_device) as stop:
        steps = range(done, ground.config.train.steps)
        end = work_ahead(steps, ground.config.teacher.ahead, teach, lambda: bridge.agree(stop.seen))
    if end == FAILED:
        raise bridge.reason()


@contextmanager
def _all_or_none(ground: common.Ground) -> Iterator[None]:
    """Where a rank fails, all stop, and say which rank was lost and which transfer waited for it.

    The process ends here: groups that wait for a lost rank, as an agreement does, would not let it end.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        ground.watch.explain(error)
        launch.abandon(error)
