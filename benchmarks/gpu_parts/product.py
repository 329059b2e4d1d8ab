"""A student and a teacher of this project on one rank, on random data, built and trained by the project's own code."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpu_parts.measure import Bench, free
from gpu_parts.shapes import Case
from megatron_capgap.config.schema import Config, DataConfig, Layout, ModelShape, Precision, StudentConfig
from megatron_capgap.config.training import TrainConfig
from megatron_capgap.runtime import third_party

if TYPE_CHECKING:
    from megatron_capgap.devices import Device
    from megatron_capgap.distributed.parallel_context import ParallelContext

PRECISION = Precision(compute="bf16")


def one_rank(bench: Bench) -> tuple[Device, ParallelContext]:
    """The device, and a layout of one rank, made once a process; before anything else imports Megatron-Core."""
    return _one_rank(bench.device)


@functools.cache
def _one_rank(name: str) -> tuple[Device, ParallelContext]:
    third_party.prepare()
    # On a machine without a network the host's name may have no address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from megatron_capgap import devices

    device = devices.choose(name, 0, (PRECISION,))
    from megatron_capgap.distributed import parallel_context, process_group
    from megatron_capgap.distributed.environment import read_environment

    process_group.init_process_group(read_environment(), device, 600)
    return device, parallel_context.build(Layout(), seed=1)


def close() -> None:
    """Destroys the process group, if `one_rank` made one."""
    from megatron_capgap.distributed import process_group

    process_group.destroy_process_group()


def build(bench: Bench, shape: ModelShape, length: int, precision: Precision = PRECISION, **options: Any) -> list[Any]:
    """Model chunks with random weights, drawn on the device; options are those of `gpt.build`."""
    device, parallel = one_rank(bench)
    from megatron_capgap.models import gpt

    chunks = gpt.build(shape, parallel, precision, device, sequence_length=length, **options)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            std = gpt.init_std(name, shape)
            with torch.no_grad():
                parameter.fill_(1.0) if std is None else parameter.normal_(0.0, std)
    return chunks


def batches(bench: Bench, case: Case) -> list[Any]:
    """The micro-batches of a global batch of random tokens."""
    from megatron_capgap.data.batch import collate

    one_rank(bench)
    draw, size, found = torch.Generator().manual_seed(5), case.micro_batch, []
    for index in range(case.micro_batches):
        rows = torch.randint(case.student.vocab, (size, case.length + 1), generator=draw).numpy()
        ids = list(range(index * size, (index + 1) * size))
        found.append(collate(list(rows), ids, case.length, torch.device(bench.device)))
    return found


class Product:
    """Distillation of one case at one depth: `step` is the teacher's forward passes and one optimizer step.

    Args:
        case: both models' shapes.
        depth: layers of each.
        bench: of the part.
    """

    def __init__(self, bench: Bench, case: Case, depth: int) -> None:
        self._device, self._parallel = one_rank(bench)
        from megatron_capgap.distillation.teacher import FrozenTeacher, freeze
        from megatron_capgap.models.gpt import unwrap
        from megatron_capgap.training import optimizer

        student, teacher = (replace(shape, layers=depth) for shape in (case.student, case.teacher))
        self._batches, self._vocab = batches(bench, case), student.vocab
        chunks = build(bench, student, case.length)
        self._chunks = optimizer.wrap(chunks, self._parallel, PRECISION, overlap=False)
        config = Config(
            run_dir="",
            student=StudentConfig(model=student),
            data=DataConfig(tokenizer="", sequence_length=case.length),
            train=TrainConfig(steps=1_000_000, micro_batch=case.micro_batch),
            precision=PRECISION,
        )
        self._optimizer = optimizer.build(self._chunks, config, self._device)
        of_teacher = build(bench, teacher, case.length, virtual=False, lm_head=False)
        freeze(of_teacher)
        samples = range(case.micro_batch * case.micro_batches)
        self._teacher = FrozenTeacher(of_teacher, self._parallel, teacher, case.micro_batch, samples, nullcontext())
        if teacher.tied_embeddings:
            self._head = unwrap(of_teacher[0]).embedding.word_embeddings.weight
        else:
            self._head = bench.randn(teacher.vocab, teacher.hidden, scale=0.02)

    def step(self) -> None:
        """The teacher's forward passes, then the student's step, as `distill` runs them on one rank."""
        from megatron_capgap.data.batch import MicroBatch
        from megatron_capgap.distillation.transfer import TeacherStates
        from megatron_capgap.distillation.transfer_plan import FINAL_HIDDEN
        from megatron_capgap.losses import DistillationObjective, Loss, TeacherHidden, distillation_loss

        states = TeacherStates(self._teacher.forward(self._batches))
        objective = DistillationObjective()

        def loss(hidden: Tensor, lm_head: Tensor, batch: MicroBatch) -> Loss:
            of_teacher = states.pop(FINAL_HIDDEN, batch.sample_ids).flatten(0, 1)
            return distillation_loss(
                hidden.flatten(0, 1),
                lm_head,
                TeacherHidden(of_teacher, self._head),
                *batch.flat(),
                objective=objective,
                vocab_size=self._vocab,
                group=self._parallel.groups.tp,
                into_main_grad=self._device.name != "cpu",
            )

        self._train(loss, objective.report)

    def cross_entropy_step(self) -> None:
        """The same student's step without a teacher."""
        from megatron_capgap.data.batch import MicroBatch
        from megatron_capgap.losses import Loss, language_model_loss

        def loss(hidden: Tensor, lm_head: Tensor, batch: MicroBatch) -> Loss:
            return language_model_loss(
                hidden.flatten(0, 1),
                lm_head,
                *batch.flat(),
                vocab_size=self._vocab,
                group=self._parallel.groups.tp,
                into_main_grad=self._device.name != "cpu",
            )

        self._train(loss, ("cross_entropy",))

    def teacher_forward(self) -> None:
        """The teacher's forward passes alone, without its head."""
        self._teacher.forward(self._batches)

    def _train(self, loss: Any, report: tuple[str, ...]) -> None:
        from megatron_capgap.training.step import train_step

        parts = (self._chunks, self._parallel, self._optimizer, self._batches, loss)
        train_step(*parts, report=report, step=1, clip_norm=1.0)

    def free(self) -> None:
        """Returns the memory of both models."""
        free(self._tensors())

    def _tensors(self) -> Iterator[Any]:
        yield self._head
        for chunk in [*self._chunks, *self._teacher.chunks]:
            for parameter in chunk.parameters():
                yield from (parameter.data, getattr(parameter, "main_grad", None), parameter.grad)
        for chunk in self._chunks:
            for buffer in chunk.buffers:
                yield from (buffer.grad_data, buffer.param_data)
        for part in self._optimizer.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield from (parameter.data, *part.optimizer.state[parameter].values())
