"""distill: a student learns a teacher's next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_capgap.checkpoint import store
from megatron_capgap.config import derive
from megatron_capgap.config.load import Loaded
from megatron_capgap.data.batch import MicroBatch
from megatron_capgap.distillation.matching import Matching
from megatron_capgap.distillation.teacher import Teacher, freeze
from megatron_capgap.losses import DistillationObjective, Loss, TeacherHidden, distillation_loss
from megatron_capgap.models import gpt
from megatron_capgap.runtime import launch
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.launch import Environment
from megatron_capgap.stages import common, record
from megatron_capgap.training.loop import train
from megatron_capgap.training.step import LossFunction


def run(loaded: Loaded, environment: Environment, device: Device) -> int:
    """Distils; returns the exit code."""
    with common.ground(loaded, "distill", environment, device) as ground:
        teacher, student = open_teacher(ground), common.student_chunks(ground)
        objective = DistillationObjective(**vars(ground.config.objective))
        vocab_size, grid = ground.resolved.student.vocab, ground.grid
        matching = Matching(student, grid, objective.matching)

        def prepare(batches: Sequence[MicroBatch]) -> LossFunction:
            states = teacher.hidden_states(batches, matching.teacher_layers)
            matching.begin(batches, states)
            taught = dict(zip(map(id, batches), states.final, strict=True))

            def loss(hidden: Tensor, head: Tensor, batch: MicroBatch) -> Loss:
                # Popped, so that the teacher's states of a micro-batch go as soon as its loss is known.
                teaching = taught.pop(id(batch)).flatten(0, 1)
                return distillation_loss(
                    hidden.flatten(0, 1),
                    head,
                    TeacherHidden(hidden=teaching, head=teacher.head()),
                    *batch.flat(),
                    objective=objective,
                    vocab_size=vocab_size,
                    group=grid.groups.tp,
                    sequence_parallel=grid.layout.sequence,
                )

            return loss

        train(common.training_run(ground, student, prepare, matching.loss if objective.matching else None))
        ground.log.say(launch.on_first_rank(lambda: record.write(ground.resolved)))
    return 0


def open_teacher(ground: common.Ground) -> Teacher:
    """Builds the teacher in the student's process groups, without virtual stages, and loads its weights. Collective."""
    resolved, config = ground.resolved, ground.config
    source, shape = resolved.teacher_source, resolved.teacher
    assert source is not None and shape is not None, "load refuses a distill configuration without a teacher"
    chunks = gpt.build(
        shape,
        ground.grid,
        derive.teacher_precision(config),
        ground.device,
        sequence_length=config.data.sequence_length,
        virtual=False,
    )
    store.load_weights(source.folder, chunks, ground.grid)
    freeze(chunks)
    if source.manifest.step < source.manifest.steps:
        done = f"step {source.manifest.step} of {source.manifest.steps}"
        ground.log.say(f"teacher: {source.folder} is at {done}: its run is not finished")
    return Teacher(chunks, ground.grid, shape, derive.teacher_micro_batch(config))
