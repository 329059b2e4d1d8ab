"""Predicted time of a step, by arithmetic alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.schema import WITHOUT_CHAIN_RULE, Config, Layout, ModelShape, Precision
from megatron_capgap.models import size
from megatron_capgap.planning.gpus import Gpu
from megatron_capgap.planning.schedule import Schedule

# Numbers per entry of the logits [tokens, vocab / tp] that the loss's Triton kernels move on a GPU, as counted by
# benchmarks/loss_traffic.py: the statistics read them, the gradient reads them and overwrites the student's; a
# divergence without a chain rule reads them once more.
_OF_STUDENT, _OF_TEACHER, _EVALUATED, _WITHOUT_CHAIN_RULE = 3, 2, 1, 2
# Bytes per parameter of the rank's part of the optimizer that one step moves: master weights and moments in fp32, read
# and written, and the gradient.
_OPTIMIZER_BYTES = 28


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the critical path; the parts add up to the step."""

    student: float = 0.0
    """Forward and backward passes of the layers, with what is recomputed."""
    teacher: float = 0.0
    """Forward passes of a colocated teacher."""
    loss: float = 0.0
    """Both LM heads and the loss, on the last pipeline stage."""
    activation_exchange: float = 0.0
    """Tensor-parallel collectives, and activations sent between pipeline stages."""
    pipeline_bubble: float = 0.0
    gradient_exchange: float = 0.0
    """Reduce-scatter of gradients and all-gather of weights, without what hides behind computation."""
    optimizer: float = 0.0
    offload: float = 0.0
    """Teacher's weights copied from host memory."""
    wait_for_teacher: float = 0.0
    """A disjoint teacher that takes longer than the student's step."""

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Pass:
    """One model's part of a step: its pipeline schedule, and the share of it that is communication."""

    schedule: Schedule
    exchange: float
    """Seconds of communication in one micro-batch."""

    @property
    def compute(self) -> float:
        """Seconds of computation in a step."""
        return self.schedule.micro_batches * (self.schedule.forward + self.schedule.backward - self.exchange)

    @property
    def bubble(self) -> float:
        """Seconds that the pipeline needs to fill and drain."""
        return self.schedule.seconds - self.schedule.micro_batches * (
            self.schedule.forward + self.schedule.backward + self.schedule.last
        )


def backward_passes(config: Config, stage: str, shape: ModelShape) -> float:
    """Forward passes that one backward pass takes, with those that are recomputed; 0 if there is none."""
    if stage == "evaluate" or (config.prune is not None and config.prune.importance != "gradient"):
        return 0.0
    layout, recompute = config.student.layout, config.student.recompute
    base = 1.0 if stage == "prune" else 2.0  # scoring needs no gradients of weights
    if recompute is None:
        return base
    if recompute.what == "mlp":
        matrices = (3 if ARCHITECTURES[shape.family].gated else 2) * shape.hidden * shape.ffn
        length = config.data.sequence_length
        layer = (size.forward_flops(shape, length) - 2.0 * shape.vocab * shape.hidden) / shape.layers
        return base + 2.0 * matrices / layer
    chunk = max(derived.chunk_layers(shape.layers, layout))
    return base + (min(recompute.layers, chunk) / chunk if recompute.layers else 1.0)


def model_pass(
    shape: ModelShape,
    layout: Layout,
    precision: Precision,
    tokens: int,
    length: int,
    micro_batches: int,
    backward: float,
    last: float,
    gpu: Gpu,
    utilisation: float,
) -> Pass:
    """The pipeline schedule of one model.

    Args:
        shape, layout, precision: of the model. All stages are taken for as long as the fullest one.
        tokens: of one micro-batch.
        length: of one sequence.
        micro_batches: of one replica in a step.
        backward: from `backward_passes`.
        last: seconds of the loss of one micro-batch.
        gpu, utilisation: rates.
    """
    layers_flops = size.forward_flops(shape, length) - 2.0 * shape.vocab * shape.hidden
    fullest = max(derived.layers_on_stage(shape.layers, layout, stage) for stage in range(layout.pipeline))
    work = tokens * layers_flops * fullest / shape.layers / (layout.tensor * layout.context)
    forward = work / (gpu.peak(precision) * 1e12 * utilisation)
    # Two collectives per layer and direction, each an all-gather and a reduce-scatter or an all-reduce of [s, b, h];
    # under sequence parallelism the backward pass gathers the inputs once more.
    states = tokens // layout.context * shape.hidden * derived.BYTES[precision.compute]
    link = gpu.nvlink if layout.tensor <= gpu.per_node else gpu.network
    part = (layout.tensor - 1) / layout.tensor * states / (link * 1e9) * fullest
    sent = 0.0
    if layout.pipeline > 1:
        near = layout.tensor * layout.pipeline <= gpu.per_node
        width = states // (layout.tensor if layout.sequence else 1)
        sent = width * layout.virtual_pipeline / ((gpu.nvlink if near else gpu.network) * 1e9)
    there = 4 * part + sent
    back = ((6 if layout.sequence else 4) + (4 if backward > 2 else 0)) * part + sent if backward else 0.0
    schedule = Schedule(
        layout.pipeline,
        micro_batches,
        forward + there,
        backward * forward + back,
        virtual=layout.virtual_pipeline,
        last=last,
    )
    return Pass(schedule, there + back)


def _loss_seconds(
    config: Config, stage: str, shape: ModelShape, teacher: ModelShape | None, tokens: int, gpu: Gpu, utilisation: float
) -> float:
    """Seconds of the loss of one micro-batch on one rank of the last stage."""
    tensor, compute = config.student.layout.tensor, derived.student_precision(config).compute
    rate = gpu.bf16 if compute == "bf16" else gpu.fp32
    entries = tokens * size.padded_vocab(shape.vocab, tensor) / tensor
    products = 2.0 if stage == "evaluate" else 4.0 if stage == "prune" else 6.0
    flops, numbers = products * shape.hidden, _EVALUATED if stage == "evaluate" else _OF_STUDENT
    if teacher is not None and config.objective.divergence_weight > 0:
        flops, numbers = flops + 2.0 * teacher.hidden, numbers + _OF_TEACHER
        numbers += _WITHOUT_CHAIN_RULE * (config.objective.divergence in WITHOUT_CHAIN_RULE)
    moved = numbers * derived.BYTES[compute]
    return entries * flops / (rate * 1e12 * utilisation) + entries * moved / (gpu.memory_bandwidth * 1e9)


def student_time(
    config: Config, stage: str, shape: ModelShape, teacher: ModelShape | None, ranks: int, gpu: Gpu, utilisation: float
) -> StepTime:
    """The student's part of a step (in prune: the teacher's scoring).

    Args:
        config: valid.
        stage: a name from `schema.STAGES`.
        shape: the model that computes.
        teacher: the teacher whose LM head the loss multiplies; None without.
        ranks: of the student.
        gpu, utilisation: rates.
    """
    layout, length = config.student.layout, config.data.sequence_length
    precision = derived.teacher_precision(config) if stage == "prune" else derived.student_precision(config)
    tokens = config.train.micro_batch * length
    backward = backward_passes(config, stage, shape)
    last = _loss_seconds(config, stage, shape, teacher, tokens // layout.context, gpu, utilisation)
    count = derived.num_microbatches(config, layout, ranks)
    own = model_pass(shape, layout, precision, tokens, length, count, backward, last, gpu, utilisation)
    exchange = optimizer = 0.0
    if stage not in ("prune", "evaluate"):
        data = ranks // derived.ranks_per_model(layout) * layout.context
        held = max(size.rank_parameters(shape, layout, pipeline_rank) for pipeline_rank in range(layout.pipeline))
        # The ranks of one tensor-parallel position on a node exchange through as many adapters.
        across = min(gpu.nvlink, gpu.network * max(1, gpu.per_node // layout.tensor))
        link = gpu.nvlink if layout.tensor * data <= gpu.per_node else across
        whole = held * (data - 1) / data / (link * 1e9)
        reduced, gathered = 4 * whole, derived.BYTES[precision.compute] * whole
        if config.train.overlap is not False:  # on a GPU by default
            reduced = max(0.0, reduced - own.schedule.backward)
            gathered = max(0.0, gathered - own.schedule.forward)
        exchange = reduced + gathered
        optimizer = _OPTIMIZER_BYTES * held / data / (gpu.memory_bandwidth * 1e9)
    return StepTime(
        student=own.compute,
        loss=count * last,
        activation_exchange=count * own.exchange,
        pipeline_bubble=own.bubble,
        gradient_exchange=exchange,
        optimizer=optimizer,
    )


def teacher_time(config: Config, teacher: ModelShape, world: int, gpu: Gpu, utilisation: float) -> StepTime:
    """The teacher's part of a step, on its own ranks or on all."""
    layout, length = derived.teacher_layout(config), config.data.sequence_length
    ranks = len(derived.teacher_rank_range(config, world))
    batch = derived.global_batch(config, config.student.layout, derived.student_world(config, world))
    micro_batch = derived.teacher_micro_batch(config)
    count = batch // derived.data_parallel(layout, ranks) // micro_batch
    precision = derived.teacher_precision(config)
    own = model_pass(teacher, layout, precision, micro_batch * length, length, count, 0.0, 0.0, gpu, utilisation)
    offload = 0.0
    if derived.teacher_section(config).offload:
        weights = size.parameters(teacher) / (layout.tensor * layout.pipeline) * derived.BYTES[precision.compute]
        offload = weights / (gpu.host * 1e9)
    return StepTime(
        teacher=own.compute, activation_exchange=count * own.exchange, pipeline_bubble=own.bubble, offload=offload
    )


def together(student: StepTime, teacher: StepTime | None, *, disjoint: bool) -> StepTime:
    """The step of both: one after the other, or at the same time on different ranks."""
    if teacher is None:
        return student
    if disjoint:
        return StepTime(**vars(student) | {"wait_for_teacher": max(0.0, teacher.total - student.total)})
    return StepTime(**{name: value + getattr(teacher, name) for name, value in vars(student).items()})
