"""Constraints between keys, and between keys and the world size. Each is one function of `CHECKS`; all of them run.

Each problem states the location, the key, its value, the conflict and the valid values.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from megatron_capgap.common.errors import ConfigError, UserError
from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.loader import STAGE_REQUIREMENTS, LoadedConfig
from megatron_capgap.config.schema import Layout, ModelShape, ObjectiveConfig
from megatron_capgap.config.validation import fp8, profile, recompute, teacher, track
from megatron_capgap.config.validation.context import (
    CheckedModel,
    ValidationContext,
    build,
    divisors,
    multiples,
    spans,
)


def check(
    loaded: LoadedConfig,
    stage: str,
    world: int,
    student: ModelShape,
    teacher: ModelShape | None,
    capability: tuple[int, int] | None = None,
) -> None:
    """Runs every check.

    Args:
        loaded: from `load`.
        stage: a name from `schema.STAGES`.
        world: number of ranks of the run, or the value of `--check-world`.
        student: student.model, or the shape in student.checkpoint.
        teacher: the shape in teacher.checkpoint; None in a stage without a teacher.
        capability: compute capability of the GPUs; None if there are none or it is unknown.

    Raises:
        ConfigError: one line per problem of every check.
    """
    ctx = build(loaded, stage, world, student, teacher, capability)
    if problems := [problem for row in CHECKS for problem in row(ctx)]:
        raise ConfigError(problems)


def check_flags(shape: ModelShape, layout: Layout, world: int) -> None:
    """Validates a tool's --tensor and --pipeline.

    Args:
        shape: shape of the model.
        layout: values of the flags.
        world: number of ranks.

    Raises:
        UserError: the layout does not fit the model or the world size.
    """
    ranks = derived.ranks_per_model(layout)
    if world % ranks:
        raise UserError(
            f"--tensor {layout.tensor} * --pipeline {layout.pipeline} does not divide the world size {world}; "
            f"start with torchrun --nproc-per-node {ranks}"
        )
    for name, number in _tp_sharded_dims(shape).items():
        if number % layout.tensor:
            raise UserError(f"--tensor: {layout.tensor} does not divide {name} {number}")
    if shape.layers % layout.pipeline:
        raise UserError(f"--pipeline: {layout.pipeline} does not divide layers {shape.layers}")


def world_holds_whole_models(ctx: ValidationContext) -> Iterator[str]:
    """tensor * pipeline * context divides the number of ranks; the quotient is the data-parallel size."""
    disjoint = ctx.world - derived.student_world(ctx.config, ctx.world)
    for key, layout in ctx.layouts:
        ranks = derived.ranks_per_model(layout)
        if disjoint and (key == "teacher.layout" or disjoint >= ctx.world):
            continue  # validation.teacher checks teacher.ranks
        if (ctx.world - disjoint) % ranks:
            product = f"tensor {layout.tensor} * pipeline {layout.pipeline} * context {layout.context} = {ranks}"
            of_all = f" - teacher.ranks {disjoint}" if disjoint else ""
            would = multiples(ctx.world - disjoint, ranks)
            yield ctx.error(
                key,
                f"{product} does not divide the world size {ctx.world}{of_all}; nearest valid numbers of "
                f"ranks: {would} (torchrun --nproc-per-node, or --check-world to plan), or use a smaller layout",
            )


def tensor_divides_shape(ctx: ValidationContext) -> Iterator[str]:
    """Attention is sharded by heads and query groups, the feed-forward layer by columns."""
    for model in ctx.models:
        shape, size = model.shape, model.layout.tensor
        wrong = [model.number(name) for name in _tp_sharded_dims(shape) if (getattr(shape, name) or size) % size]
        if wrong:
            # Suggest values that are valid for every model with this layout.
            same_layout_shapes = [other.shape for other in ctx.models if other.layout_key == model.layout_key]
            numbers = [number for other in same_layout_shapes for number in _tp_sharded_dims(other).values()]
            text = f"{size} does not divide {' and '.join(wrong)}; valid values: {divisors(*numbers)}"
            yield ctx.error(f"{model.layout_key}.tensor", text)


def _tp_sharded_dims(shape: ModelShape) -> dict[str, int]:
    return {"heads": shape.heads, "kv_heads": derived.kv_heads(shape), "ffn": shape.ffn}


def key_value_heads_divide_heads(ctx: ValidationContext) -> Iterator[str]:
    """Every key/value head serves the same number of query heads."""
    for model in ctx.models:
        heads, kv_heads = model.shape.heads, derived.kv_heads(model.shape)
        if heads % kv_heads:
            text = f"{kv_heads} does not divide heads {heads}; valid values: {divisors(heads)}"
            yield f"{model.error_prefix('kv_heads')}{text}"


def family_supports_shape(ctx: ValidationContext) -> Iterator[str]:
    """Some keys of the shape apply to some families only."""
    for model in ctx.models:
        shape, traits = model.shape, ARCHITECTURES[model.shape.family]
        if not traits.grouped_queries and shape.kv_heads not in (None, shape.heads):
            text = f"{shape.kv_heads} differs from heads {shape.heads}, but {shape.family} has no grouped queries"
            yield f"{model.error_prefix('kv_heads')}{text}; valid value: {shape.heads}"
        if not traits.free_head_dim and (shape.head_dim or 0) * shape.heads not in (0, shape.hidden):
            text = f"{shape.head_dim} * heads {shape.heads} is not hidden {shape.hidden}, as {shape.family} requires"
            yield f"{model.error_prefix('head_dim')}{text}; remove the key"
        if traits.learned_positions and shape.max_positions is None:
            text = f"null, but {shape.family} has an embedding for each position; set it to the longest sequence"
            yield f"{model.error_prefix('max_positions')}{text}"
        unread = ["rope_scaling", "rope_theta"] if traits.learned_positions else []
        for name in [*unread, *([] if traits.partial_rotary else ["rotary_share"])]:
            if (value := getattr(shape, name)) != _default(name):
                yield f"{model.error_prefix(name)}{value}: {shape.family} does not use this key; remove it"


def sequences_fit_the_models(ctx: ValidationContext) -> Iterator[str]:
    """There is no embedding beyond the last learned position, and a window shorter than the sequence changes
    attention."""
    length = ctx.config.data.sequence_length
    for model in ctx.models:
        learned = ARCHITECTURES[model.shape.family].learned_positions
        names = ("max_positions", "attention_window") if learned else ("attention_window",)
        for name in names:
            limit = getattr(model.shape, name)
            if limit is not None and length > limit:
                text = f"{length} is longer than {model.number(name)}; use at most {limit}, or another model"
                yield ctx.error("data.sequence_length", text)


def _default(name: str) -> object:
    return next(field.default for field in fields(ModelShape) if field.name == name)


def heads_have_an_even_width(ctx: ValidationContext) -> Iterator[str]:
    """Rotary positions rotate pairs of channels within a head."""
    for model in ctx.models:
        hidden, heads, given = model.shape.hidden, model.shape.heads, model.shape.head_dim
        width = given or hidden // heads
        if given is None and hidden % heads:
            text = f"{hidden} is not divisible by heads {heads}"
            yield (
                f"{model.error_prefix('hidden')}{text}; nearest valid values: {multiples(hidden, heads)}, "
                "or set head_dim"
            )
        elif ARCHITECTURES[model.shape.family].learned_positions:
            continue
        elif (turned := int(width * model.shape.rotary_share)) % 2 or not turned:
            name, value = ("head_dim", given) if given else ("hidden", hidden)
            text = f"{value} makes heads {width} wide, but rotary positions need an even number of channels"
            yield f"{model.error_prefix(name)}{text}; nearest valid values of head_dim: {multiples(width, 2)}"


def layers_fill_the_pipeline(ctx: ValidationContext) -> Iterator[str]:
    """Every pipeline stage and every virtual stage has the same number of layers, or that of `stage_layers`."""
    for model in ctx.models:
        layers, layout = model.shape.layers, model.layout
        pipeline, virtual = layout.pipeline, layout.virtual_pipeline
        if layout.stage_layers is not None:
            yield from _layers_of_stages(ctx, model)
        elif layers % pipeline:
            text = f"{pipeline} does not divide {model.number('layers')}; valid values: {divisors(layers)}"
            if ctx.stage != "prune" and 1 < pipeline < layers and virtual == 1:
                own = model.layout_key == f"{model.role}.layout"
                key = (
                    f"{model.role}.layout.stage_layers" if own else f"pipeline and stage_layers in {model.role}.layout"
                )
                text += f", or set {key}, for example to {'' if own else f'{pipeline} and '}{_split(layers, pipeline)}"
            yield ctx.error(f"{model.layout_key}.pipeline", text)
        elif layers % (pipeline * virtual):
            text = f"{virtual} * pipeline {pipeline} does not divide {model.number('layers')}"
            key = f"{model.layout_key}.virtual_pipeline"
            yield ctx.error(key, f"{text}; valid values: {divisors(layers // pipeline)}")


def _layers_of_stages(ctx: ValidationContext, model: CheckedModel) -> Iterator[str]:
    layout, layers = model.layout, model.shape.layers
    assert layout.stage_layers is not None
    key, value = f"{model.layout_key}.stage_layers", list(layout.stage_layers)
    if ctx.stage == "prune":
        yield ctx.error(key, f"{value}: teacher and student differ in their layers; set it to null for prune")
    elif layout.virtual_pipeline > 1:
        text = f"{value}: not with virtual_pipeline {layout.virtual_pipeline}; set it to null, or virtual_pipeline to 1"
        yield ctx.error(key, text)
    elif len(value) != layout.pipeline or sum(value) != layers:
        text = f"{value} are {sum(value)} layers on {len(value)} stage(s), not {model.number('layers')} on "
        example = f"; for example {_split(layers, layout.pipeline)}" if layout.pipeline <= layers else ""
        yield ctx.error(key, f"{text}pipeline {layout.pipeline}{example}, or null")


def _split(layers: int, stages: int) -> list[int]:
    """As equal numbers as possible, the smaller ones last, where the loss is."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def virtual_stages_have_a_pipeline(ctx: ValidationContext) -> Iterator[str]:
    """Megatron's interleaved schedule processes micro-batches in groups of the pipeline size."""
    layout, train = ctx.config.student.layout, ctx.config.train
    key, virtual = "student.layout.virtual_pipeline", layout.virtual_pipeline
    if virtual > 1 and layout.pipeline == 1:
        yield ctx.error(key, f"{virtual} requires pipeline > 1; set it to 1, or increase pipeline")
    elif virtual > 1 and ctx.dp_size:
        portion = train.micro_batch * ctx.dp_size * layout.pipeline
        batch = derived.global_batch(ctx.config, layout, derived.student_world(ctx.config, ctx.world))
        if batch % portion:
            product = f"micro_batch {train.micro_batch} * data-parallel size {ctx.dp_size} * pipeline {layout.pipeline}"
            text = f"{virtual} requires that train.global_batch, now {batch}, is a multiple of {product} = {portion}"
            yield ctx.error(
                key,
                f"{text}; nearest valid values of global_batch: {multiples(batch, portion)}, "
                "or set virtual_pipeline to 1",
            )


def sequence_divides_over_ranks(ctx: ValidationContext) -> Iterator[str]:
    """The sequence is sharded in two chunks per context-parallel rank, and under sequence parallelism over the
    tensor-parallel ranks. The suggested lengths suit every model."""
    length = ctx.config.data.sequence_length
    nearest = multiples(length, math.lcm(*(derived.length_unit(model.layout) for model in ctx.models)))
    for key, layout in ctx.layouts:
        if layout.sequence and layout.tensor == 1:
            yield ctx.error(f"{key}.sequence", "true requires tensor > 1; set it to false, or increase tensor")
        elif length % derived.length_unit(layout):
            text = f"{length} is not divisible by {key}.tensor {layout.tensor}, and {key}.sequence is true"
            if layout.context > 1:
                by = f" * tensor {layout.tensor} (sequence is true)" if layout.sequence else ""
                text = f"{length} is not divisible by 2 * {key}.context {layout.context}{by}"
            yield ctx.error("data.sequence_length", f"{text}; nearest valid values: {nearest}")


def scores_read_whole_sequences(ctx: ValidationContext) -> Iterator[str]:
    """Importance scores take absolute values of sums over the tokens of a micro-batch, which no rank has under context
    parallelism."""
    if ctx.stage == "prune" and (context := ctx.config.student.layout.context) > 1:
        text = f"{context}: prune does not shard the sequence; set context: 1"
        yield ctx.error("student.layout.context", text)


def batch_divides_over_ranks(ctx: ValidationContext) -> Iterator[str]:
    """Every student replica runs the same number of micro-batches."""
    train, dp_size = ctx.config.train, ctx.dp_size
    if train.global_batch and dp_size and train.global_batch % (train.micro_batch * dp_size):
        portion = train.micro_batch * dp_size
        product = f"train.micro_batch {train.micro_batch} * data-parallel size {dp_size} = {portion}"
        text = f"{train.global_batch} is not a multiple of {product}"
        yield ctx.error("train.global_batch", f"{text}; nearest valid values: {multiples(train.global_batch, portion)}")


def learning_rate_falls(ctx: ValidationContext) -> Iterator[str]:
    """The schedule decays from lr to min_lr."""
    lr, min_lr = ctx.config.optimizer.lr, ctx.config.optimizer.min_lr
    if min_lr > lr:
        yield ctx.error("optimizer.min_lr", f"{min_lr} is above optimizer.lr {lr}; use at most {lr}")


def every_training_set_has_a_weight(ctx: ValidationContext) -> Iterator[str]:
    """Weights correspond to datasets by position."""
    weights, count = ctx.config.data.train_weights, len(ctx.config.data.train)
    if weights is not None and len(weights) != count:
        text = f"{len(weights)} weights for the {count} entries of data.train; give {count} weights"
        yield ctx.error("data.train_weights", text)


def evaluations_have_data(ctx: ValidationContext) -> Iterator[str]:
    """Evaluations need data.valid."""
    every = ctx.config.train.eval_every
    if every and not ctx.config.data.valid:
        yield ctx.error(
            "train.eval_every", f"{every} requires data.valid, which is empty; set data.valid, or set eval_every to 0"
        )


def objective_is_used(ctx: ValidationContext) -> Iterator[str]:
    """With a teacher at least one weight is positive; without a teacher the objective is not read."""
    objective = ctx.config.objective
    if ctx.config.teacher is not None and "objective" not in STAGE_REQUIREMENTS[ctx.stage].unread:
        if objective.divergence_weight == objective.cross_entropy_weight == 0 and not objective.matching:
            text = "0, and so is cross_entropy_weight: the objective is empty; set a weight > 0"
            yield ctx.error("objective.divergence_weight", text)
        return
    for name, default in vars(ObjectiveConfig()).items():
        given = getattr(objective, name)
        # Defaults are accepted: resolved.yaml of an earlier run has them all.
        if f"objective.{name}" in ctx.loaded.sources and given != default:
            shown = f"{len(given)} pairs" if isinstance(given, tuple) else given
            why = "has no teacher" if ctx.config.teacher is None else "has no objective"
            text = f"{shown}: {ctx.stage} {why}, so this key has no effect; remove it"
            yield ctx.error(f"objective.{name}", text)


def matched_layers_exist(ctx: ValidationContext) -> Iterator[str]:
    """A pair refers to existing layers, and no pair occurs twice."""
    pairs = ctx.config.objective.matching
    for index, pair in enumerate(pairs):
        key = f"objective.matching.{index}"
        for model in ctx.models:
            layer, layers = getattr(pair, f"{model.role}_layer"), model.shape.layers
            if layer > layers:
                text = f"{layer} is beyond {model.number('layers')}; valid values: {spans(range(1, layers + 1))}"
                yield ctx.error(f"{key}.{model.role}_layer", text)
        if any(replace(other, weight=pair.weight) == pair for other in pairs[:index]):
            pair_text = f"student layer {pair.student_layer}, teacher layer {pair.teacher_layer}, {pair.kind}"
            yield ctx.error(key, f"{pair_text} is a duplicate; keep one of them, with the sum of their weights")


def conversations_are_read_once_an_epoch(ctx: ValidationContext) -> Iterator[str]:
    """Sampling weights would read some conversations more often than others."""
    if ctx.stage == "finetune" and ctx.config.data.train_weights is not None:
        text = "finetune reads every conversation once per epoch, without sampling weights; remove the key"
        yield ctx.error("data.train_weights", text)


def patience_has_evaluations(ctx: ValidationContext) -> Iterator[str]:
    """Early stopping needs evaluations during training."""
    finetune, train = ctx.config.finetune, ctx.config.train
    if ctx.stage == "finetune" and finetune and finetune.patience and not train.eval_every:
        text = f"{finetune.patience} requires train.eval_every > 0, which is 0; set eval_every, or remove patience"
        yield ctx.error("finetune.patience", text)


def finetuning_shares_all_ranks(ctx: ValidationContext) -> Iterator[str]:
    """Early stopping, and a number of steps derived from epochs, are not communicated to a disjoint teacher."""
    teacher = ctx.config.teacher
    if ctx.stage == "finetune" and teacher is not None and teacher.placement == "disjoint":
        text = "disjoint: finetune does not support a disjoint teacher; valid value: colocated"
        yield ctx.error("teacher.placement", text)


CHECKS: tuple[Callable[[ValidationContext], Iterator[str]], ...] = (
    world_holds_whole_models,
    tensor_divides_shape,
    key_value_heads_divide_heads,
    family_supports_shape,
    sequences_fit_the_models,
    heads_have_an_even_width,
    layers_fill_the_pipeline,
    virtual_stages_have_a_pipeline,
    sequence_divides_over_ranks,
    scores_read_whole_sequences,
    batch_divides_over_ranks,
    *teacher.CHECKS,
    learning_rate_falls,
    every_training_set_has_a_weight,
    evaluations_have_data,
    objective_is_used,
    matched_layers_exist,
    conversations_are_read_once_an_epoch,
    patience_has_evaluations,
    finetuning_shares_all_ranks,
    *recompute.CHECKS,
    *fp8.CHECKS,
    *profile.CHECKS,
    *track.CHECKS,
)
