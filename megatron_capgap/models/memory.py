"""Memory estimate: bytes that a run needs on the rank that needs most, by arithmetic alone. No torch.

The estimate is the peak of a step, at the first layer of the backward pass: weights, gradients, optimizer state, all
activations that the local layers save, the loss, and the teacher. A checkpoint save and the teacher's forward pass
happen at other times, when no activation is alive. Not included: the interpreter with its libraries, and communication
buffers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.schema import Config, Layout, ModelShape, Precision
from megatron_capgap.config.validation import fp8
from megatron_capgap.models import activations, size
from megatron_capgap.models.logits import Logits, of_loss

# Bytes per parameter and in total while a checkpoint is written, measured: complete weights and both moments on the
# first data-parallel rank, then the copies that are written to the file.
_SAVED_BYTES, _SAVING_BUFFERS = 36, 16 << 20
# Weights and both moments in fp32.
_COPIED_BYTES = 12
# On a CPU glibc serves blocks below 4 MiB from its heap, where a freed aligned block rarely fits the next request.
# Measured overhead: about one more byte per live byte, and almost two under sequence parallelism, where gathered
# copies are allocated and freed between longer-lived tensors.
_HEAP_BLOCK, _HEAP_WASTE, _HEAP_WASTE_OF_SEQUENCE = 4 << 20, 1.0, 1.75
_WORKSPACE = 24 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    backward_pass: int = 0
    loss: int = 0
    fp8_copies: int = 0
    """Weights of the layers cast to FP8, for forward and backward pass: kept for a step in addition to the bf16
    weights; with param_gather these are the weights."""
    teacher_weights: int = 0
    """Including its LM head on the student's last stage."""
    teacher_hidden: int = 0
    """The teacher's hidden states that are stored: for the student, or on the teacher's own ranks until sent."""
    teaching: int = 0
    """The teacher's forward pass, and its hidden states that this rank sends; not at the same time as activations,
    backward pass and loss."""
    heap: int = 0
    """CPU: the allocator's overhead for small activations."""
    workspace: int = 0
    """CPU: buffers into which the matrix library packs its operands, measured."""
    saving: int = 0
    """Copies while a checkpoint is written; not at the same time as activations, backward pass and loss."""
    saved_beside: int = 0
    """The copy from which an asynchronous save writes the checkpoint during training; freed once it is written."""
    until_cast: int = 0
    """Additional bytes of FP8 parameters while they are loaded in bf16; 0 if the transposed copies take as much.
    Gradients and optimizer state are created later."""

    def at_peak(self) -> dict[str, int]:
        """Bytes of each part that is there at the peak of the step, by name."""
        moments = (("activations", "backward_pass", "loss", "heap"), ("saving",), ("teaching",))
        loaded = ("weights", "fp8_copies", "teacher_weights", "until_cast")
        largest = max(moments, key=lambda names: sum(getattr(self, name) for name in names))
        absent = {"until_cast", *(name for names in moments if names != largest for name in names)}
        step = {name: value for name, value in vars(self).items() if name not in absent}
        before = {name: getattr(self, name) for name in loaded}
        return max(step, before, key=lambda rows: sum(rows.values()))

    @property
    def total(self) -> int:
        """Peak of the step, in bytes."""
        return sum(self.at_peak().values())


def estimate(
    config: Config, stage: str, student: ModelShape, teacher: ModelShape | None, world: int, *, on_cpu: bool
) -> Memory:
    """Estimate for the rank that needs most, of those that hold the student.

    Args:
        config: checked.
        stage: a name from `schema.STAGES`.
        student, teacher: shapes.
        world: number of ranks, the teacher's own included.
        on_cpu: whether the run is on a CPU, whose allocator and matrix library need more.
    """
    ranks = derived.student_world(config, world)
    needs = []
    for mine, of_teacher in _stages(config, world):
        need = _of_stage(config, stage, student, teacher, ranks, mine, on_cpu)
        if teacher is not None and derived.teacher_runs(config, stage):
            share = teacher_memory(config, student, teacher, world, mine, of_teacher)
            away = share.weights if derived.teacher_section(config).offload and not on_cpu else 0
            need = replace(
                need,
                teacher_weights=share.weights - away + share.lm_head,
                teacher_hidden=share.needed,
                teaching=share.forward + away + (0 if _hidden_states_stay(config) else share.held),
                until_cast=share.until_cast,
            )
        needs.append(need)
    if not on_cpu:
        # On a GPU a save copies to host memory.
        needs = [replace(need, heap=0, workspace=0, saving=0, saved_beside=0) for need in needs]
    return max(needs, key=lambda need: need.total)


def _of_stage(
    config: Config,
    stage: str,
    student: ModelShape,
    teacher: ModelShape | None,
    world: int,
    pipeline_rank: int,
    on_cpu: bool,
) -> Memory:
    if stage == "prune":
        assert teacher is not None
        return _of_scoring(config, teacher, world, pipeline_rank, on_cpu)
    layout, precision = config.student.layout, derived.student_precision(config)
    width = derived.BYTES[precision.compute]
    held = size.rank_parameters(student, layout, pipeline_rank)
    held += _projections(config, student, teacher, pipeline_rank)
    tokens = config.train.micro_batch * config.data.sequence_length // layout.context
    last = pipeline_rank == layout.pipeline - 1
    gated = ARCHITECTURES[student.family].gated
    backward = (6 if gated else 4) * student.ffn // layout.tensor  # the largest part: one feed-forward layer
    in_fp8 = _weights_in_fp8(precision, student, layout, pipeline_rank, backward=stage != "evaluate")
    if stage == "evaluate":
        return Memory(
            weights=held * width - in_fp8.not_in_bf16,
            activations=backward * tokens * width,
            loss=Logits(student, layout, precision, on_cpu).of_chunks(tokens) if last else 0,
            fp8_copies=in_fp8.copies,
            until_cast=in_fp8.until_cast,
        )
    num_microbatches = derived.num_microbatches(config, layout, world)
    layers = activations.layers_in_flight(layout, num_microbatches, pipeline_rank, student.layers)
    recompute, on_stage = config.student.recompute, derived.layers_on_stage(student.layers, layout, pipeline_rank)
    cast = layers * _fp8_layers(precision, student, layout, pipeline_rank) // on_stage
    layer_input = activations.shard_numel(student.hidden, layout) * width
    kept, again = [layer_input] * 2 if last else [], list[int]()
    for count, recipe in ((layers - cast, None), (cast, precision.fp8.recipe if precision.fp8 else None)):
        layer = activations.of_layer(student, layout, width, recipe)
        kept += activations.at_peak(layer, layer_input, count, on_stage // layout.virtual_pipeline, recompute)
        again = max(again, activations.recomputed(layer, recompute) if count else [], key=sum)
    kept += again
    # With packed conversations each layer saves the mask that is added to its attention scores.
    masks = 0
    if stage == "finetune":
        whole = activations.layers_recomputed(layers, on_stage // layout.virtual_pipeline, recompute)
        masks = (layers - whole + (recompute.every if whole and recompute else 0)) * tokens
        masks *= config.data.sequence_length * width
    return Memory(
        weights=held * width - in_fp8.not_in_bf16,
        gradients=held * 4,
        # Adam's two moments in fp32, and fp32 master weights if weights are bf16; sharded over data and context ranks.
        optimizer=held * (8 if width == 4 else 12) // (derived.data_parallel(layout, world) * layout.context),
        activations=sum(kept) * tokens + masks,
        backward_pass=backward * tokens * width,
        loss=of_loss(config, student, teacher, tokens, on_cpu) if last else 0,
        fp8_copies=in_fp8.copies,
        heap=_heap([*kept, *[student.ffn // layout.tensor * width] * 6], tokens, layout),
        workspace=_WORKSPACE,
        saving=_SAVED_BYTES * held + _SAVING_BUFFERS,
        saved_beside=_COPIED_BYTES * held if config.checkpoint.async_save else 0,
    )


def _of_scoring(config: Config, teacher: ModelShape, world: int, pipeline_rank: int, on_cpu: bool) -> Memory:
    """A teacher during importance scoring: gradients of activations, but not of weights."""
    layout = replace(config.student.layout, virtual_pipeline=1)
    precision = derived.teacher_precision(config)
    width = derived.BYTES[precision.compute]
    tokens = config.train.micro_batch * config.data.sequence_length
    last = pipeline_rank == layout.pipeline - 1
    backward = (6 if ARCHITECTURES[teacher.family].gated else 4) * teacher.ffn // layout.tensor
    kept: list[int] = []
    if config.prune is not None and config.prune.importance == "gradient":
        # Frozen linears save no inputs, so the norms' outputs are freed. The outputs of attention and feed-forward are
        # kept for the scores instead.
        num_microbatches = derived.num_microbatches(config, config.student.layout, world)
        layers = activations.layers_in_flight(layout, num_microbatches, pipeline_rank, teacher.layers)
        layer, layer_input = (
            activations.of_layer(teacher, layout, width),
            activations.shard_numel(teacher.hidden, layout),
        )
        recompute = config.student.recompute
        chunk_layers = derived.layers_on_stage(teacher.layers, layout, pipeline_rank)
        kept = activations.at_peak(layer, layer_input * width, layers, chunk_layers, recompute)
        kept += activations.recomputed(layer, recompute)
    in_fp8 = _weights_in_fp8(precision, teacher, layout, pipeline_rank, backward=bool(kept))
    logits = Logits(teacher, layout, precision, on_cpu)
    return Memory(
        weights=size.rank_parameters(teacher, layout, pipeline_rank) * width - in_fp8.not_in_bf16,
        activations=sum(kept) * tokens,
        backward_pass=backward * tokens * width,
        loss=logits.of_chunks(tokens) + tokens * teacher.hidden * width if last else 0,
        fp8_copies=in_fp8.copies,
        heap=_heap([*kept, *[teacher.ffn // layout.tensor * width] * 6], tokens, layout),
        workspace=_WORKSPACE,
        until_cast=in_fp8.until_cast,
    )


@dataclass(frozen=True)
class TeacherMemory:
    """The teacher's bytes on one rank."""

    weights: int
    """Its layers and input embedding on this rank."""
    lm_head: int
    """Its LM head, sharded like the student's, on the student's last stage."""
    held: int
    """The hidden states of a global batch that it computes on this rank."""
    needed: int
    """The hidden states of a global batch that the student needs on this rank."""
    forward: int
    """Live activations of its forward pass."""
    until_cast: int
    """Additional bytes of its FP8 parameters while they are loaded."""


def teacher_memory(
    config: Config, student: ModelShape, teacher: ModelShape, world: int, mine: int | None, of_teacher: int | None
) -> TeacherMemory:
    """The teacher's memory on one rank.

    Args:
        config: checked.
        student, teacher: shapes.
        world: number of ranks, the teacher's own included.
        mine: the student's pipeline stage on this rank; None on a rank of the teacher's own.
        of_teacher: the teacher's pipeline stage on this rank; None on a rank without the teacher.
    """
    precision = derived.teacher_precision(config)
    width, length = derived.BYTES[precision.compute], config.data.sequence_length
    layout, teacher_layout = config.student.layout, derived.teacher_layout(config)
    ranks = derived.student_world(config, world)
    batch = derived.global_batch(config, layout, ranks) * length
    weights = lm_head = held = needed = forward = until_cast = 0
    if of_teacher is not None:
        in_fp8 = _weights_in_fp8(precision, teacher, teacher_layout, of_teacher, backward=False)
        weights = size.rank_parameters(teacher, teacher_layout, of_teacher, lm_head=False) * width
        weights, until_cast = weights + in_fp8.copies - in_fp8.not_in_bf16, in_fp8.until_cast
        last = of_teacher == teacher_layout.pipeline - 1
        outputs = len(_matched_layers(config, teacher, teacher_layout, of_teacher, "teacher")) + last
        shards = derived.data_parallel(teacher_layout, len(derived.teacher_rank_range(config, world)))
        shards *= teacher_layout.context
        held = outputs * batch // shards * activations.shard_numel(teacher.hidden, teacher_layout) * width
        tokens = derived.teacher_micro_batch(config) * length // teacher_layout.context
        wide = (3 if ARCHITECTURES[teacher.family].gated else 2) * teacher.ffn // teacher_layout.tensor
        forward = (wide + 2 * activations.shard_numel(teacher.hidden, teacher_layout)) * tokens * width
    if mine is not None:
        last = mine == layout.pipeline - 1
        outputs = len(_matched_layers(config, student, layout, mine, "student")) + last
        needed = (
            outputs
            * batch
            // (derived.data_parallel(layout, ranks) * layout.context)
            * activations.shard_numel(teacher.hidden, layout)
            * width
        )
        lm_head_shape = replace(teacher, vocab=student.vocab)
        same_shards = teacher_layout.pipeline == 1 and teacher_layout.tensor == layout.tensor
        same_weight = teacher.tied_embeddings and same_shards and of_teacher == 0 and lm_head_shape == teacher
        shared = same_weight and not derived.teacher_section(config).offload
        lm_head = size.lm_head_parameters(lm_head_shape, layout) * width if last and not shared else 0
    return TeacherMemory(weights, lm_head, held, needed, forward, until_cast)


def estimate_teacher(config: Config, student: ModelShape, teacher: ModelShape, world: int) -> Memory:
    """Estimate for the rank that needs most, of the teacher's own ranks; arguments as in `estimate`."""
    needs = []
    for stage in range(derived.teacher_layout(config).pipeline):
        share = teacher_memory(config, student, teacher, world, None, stage)
        waiting = (derived.teacher_section(config).ahead - 1) * share.held
        needs.append(
            Memory(
                teacher_weights=share.weights,
                teacher_hidden=waiting,
                teaching=share.held + share.forward,
                until_cast=share.until_cast,
            )
        )
    return max(needs, key=lambda need: need.total)


def _stages(config: Config, world: int) -> list[tuple[int, int | None]]:
    """Pairs (student's stage, teacher's stage or None) that share a rank of the student's."""
    pipeline = config.student.layout.pipeline
    if config.teacher is None or config.teacher.placement == "disjoint":
        return [(stage, None) for stage in range(pipeline)]
    teacher_pipeline = derived.teacher_layout(config).pipeline
    # Both stages change at multiples of world / lcm only.
    blocks = math.lcm(pipeline, teacher_pipeline)
    return sorted({(block * pipeline // blocks, block * teacher_pipeline // blocks) for block in range(blocks)})


def _hidden_states_stay(config: Config) -> bool:
    """Whether every rank of the student's already holds the teacher's states it needs, so that nothing is copied."""
    student, teacher = config.student.layout, derived.teacher_layout(config)
    names = ("tensor", "pipeline", "context", "sequence")
    same_layout = all(getattr(student, name) == getattr(teacher, name) for name in names)
    return derived.teacher_section(config).placement == "colocated" and same_layout and not config.objective.matching


@dataclass(frozen=True)
class _InFP8:
    """Bytes of the weights that multiply in FP8 on one rank."""

    copies: int
    """One byte per weight, and another for the transposed copy that the backward pass uses."""
    not_in_bf16: int
    """Bytes they would take in bf16, if the parameters are FP8; otherwise 0."""

    @property
    def until_cast(self) -> int:
        """Bytes needed before the cast, beyond those of the FP8 copies."""
        return max(0, self.not_in_bf16 - self.copies)


def _weights_in_fp8(precision: Precision, shape: ModelShape, layout: Layout, stage: int, *, backward: bool) -> _InFP8:
    of_layer = sum(outputs * inputs for outputs, inputs in fp8.linears(shape, layout).values())
    weights = of_layer * _fp8_layers(precision, shape, layout, stage)
    held = precision.fp8 is not None and precision.fp8.param_gather
    return _InFP8((2 if backward else 1) * weights, derived.BYTES[precision.compute] * weights if held else 0)


def _fp8_layers(precision: Precision, shape: ModelShape, layout: Layout, stage: int) -> int:
    """Layers in FP8 on one pipeline stage."""
    if precision.fp8 is None:
        return 0
    aside = precision.fp8.first_last_layers_bf16
    return derived.stages_of_layers(shape.layers, layout)[aside : shape.layers - aside].count(stage)


def _matched_layers(config: Config, shape: ModelShape, layout: Layout, stage: int, role: str) -> set[int]:
    """Matched layers of the teacher: those on its stage `stage` if `role` is teacher, otherwise those matched with a
    layer on the student's stage `stage`."""
    stages = derived.stages_of_layers(shape.layers, layout)
    pairs = config.objective.matching
    return {pair.teacher_layer for pair in pairs if stages[getattr(pair, f"{role}_layer") - 1] == stage}


def _projections(config: Config, student: ModelShape, teacher: ModelShape | None, pipeline_rank: int) -> int:
    """Parameters of the projections on one stage, replicated on the tensor-parallel ranks."""
    stages = derived.stages_of_layers(student.layers, config.student.layout)
    pairs = derived.projected_pairs(config, student, teacher)
    count = sum(stages[pair.student_layer - 1] == pipeline_rank for pair in pairs)
    if not count:
        return 0
    assert teacher is not None, "no layers are matched without a teacher"
    return count * teacher.hidden * student.hidden


def _heap(kept: list[int], tokens: int, layout: Layout) -> int:
    """Overhead in bytes of glibc's heap for tensors of the given bytes per token."""
    sizes = [nbytes * tokens for nbytes in kept]
    waste = _HEAP_WASTE_OF_SEQUENCE if layout.sequence else _HEAP_WASTE
    return int(waste * sum(nbytes for nbytes in sizes if nbytes < _HEAP_BLOCK))
