"""FP8 constraints: supported combinations, alignment, and the number of matrix products in FP8.

Transformer Engine and Megatron accept some of the combinations refused here and fail hours later, or ignore them.
Alignments are those of Transformer Engine 2.11 on Hopper and Blackwell GPUs, whose GEMMs read rows of 16 bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.schema import FP8, Layout, ModelShape, Precision
from megatron_capgap.config.validation.context import CheckedModel, ValidationContext, multiples

# Lowest compute capability with each recipe's kernels.
CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
# First compute capability without them: Transformer Engine 2.11 lacks a layout of MXFP8 products there.
_TOO_NEW = {"mxfp8": (12, 0)}
# Required divisors of the dimensions of a linear's local weight and input.
_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# With sequence parallelism, blockwise quantises the local shard of the input before the all-gather.
_BLOCK = 128
_LINEARS = 4  # of one layer: qkv, proj, fc1, fc2


@dataclass(frozen=True)
class GemmCount:
    """Matrix products of linears per micro-batch: transformer layers, and the LM head of a student."""

    fp8: int
    others: int


def gemm_count(precision: Precision, shape: ModelShape, *, trains: bool, again: Sequence[int] = ()) -> GemmCount:
    """Number of matrix products in FP8 and in the compute type: one per linear in a forward pass, two more in a
    backward pass, and one for each linear that is recomputed.

    Args:
        precision: precision of the model.
        shape: shape of the model.
        trains: whether there is a backward pass.
        again: from `derived.recomputed_linears`; empty without recomputation.
    """
    passes = 3 if trains else 1
    inner, outer = layers_in_fp8(precision, shape), passes  # the LM head
    first = (shape.layers - inner) // 2
    in_fp8 = range(first, first + inner)
    products = [passes * _LINEARS + more for more in again or [0] * shape.layers]
    count = sum(products[layer] for layer in in_fp8)
    return GemmCount(fp8=count, others=sum(products) - count + outer)


def layers_in_fp8(precision: Precision, shape: ModelShape) -> int:
    """Number of layers whose linears run in FP8."""
    return max(0, shape.layers - 2 * precision.fp8.first_last_layers_bf16) if precision.fp8 else 0


def linears(shape: ModelShape, layout: Layout) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the local weight shard of each linear in a layer."""
    width = derived.head_dim(shape)
    query, key_value = shape.heads * width, derived.kv_heads(shape) * width
    tensor = layout.tensor
    return {
        "qkv": ((query + 2 * key_value) // tensor, shape.hidden),
        "proj": (shape.hidden, query // tensor),
        "fc1": ((2 if ARCHITECTURES[shape.family].gated else 1) * shape.ffn // tensor, shape.hidden),
        "fc2": (shape.hidden, shape.ffn // tensor),
    }


def _models(ctx: ValidationContext) -> Iterator[tuple[CheckedModel, str, FP8]]:
    """Every model with FP8, with the key of its precision and its FP8 section."""
    return ((m, m.precision_key, m.precision.fp8) for m in ctx.models if m.precision.fp8 is not None)


def _forward_only(ctx: ValidationContext, model: CheckedModel) -> bool:
    return model.role == "teacher" or ctx.stage == "evaluate"


def needs_transformer_engine(ctx: ValidationContext) -> Iterator[str]:
    """Megatron's local layers do not support FP8."""
    for model, key, _ in _models(ctx):
        if model.precision.engine == "local":
            text = "local does not support FP8; valid values: transformer_engine, auto; or remove fp8"
            yield ctx.error(f"{key}.engine", text)


def options_are_read(ctx: ValidationContext) -> Iterator[str]:
    """Only delayed scaling keeps a history."""
    defaults = FP8(recipe="delayed")
    for _, key, fp8 in _models(ctx):
        for name in ("amax_history", "amax_algorithm"):
            given = getattr(fp8, name)
            if fp8.recipe != "delayed" and given != getattr(defaults, name):
                text = f"{given}: recipe {fp8.recipe} keeps no history, so this key has no effect; remove it"
                yield ctx.error(f"{key}.fp8.{name}", text)


def delayed_scales_are_learned(ctx: ValidationContext) -> Iterator[str]:
    """Transformer Engine updates delayed scales in training only; otherwise tensors would be cast unscaled."""
    for model, key, fp8 in _models(ctx):
        if fp8.recipe == "delayed" and _forward_only(ctx, model):
            text = f"delayed: its scales are updated in training only, and the {model.role} runs forward only"
            yield ctx.error(f"{key}.fp8.recipe", f"{text}; valid values: tensorwise, blockwise")


def first_and_last_layers(ctx: ValidationContext) -> Iterator[str]:
    """Layers outside FP8 lie within the first and last pipeline stage, leave at least one layer in FP8, and exclude
    recipe delayed."""
    for model, key, fp8 in _models(ctx):
        count, layers, pipeline = fp8.first_last_layers_bf16, model.shape.layers, model.layout.pipeline
        where = f"{key}.fp8.first_last_layers_bf16"
        if count and fp8.recipe == "delayed":
            text = f"{count}: recipe delayed has one scaling context for all layers"
            yield ctx.error(where, f"{text}; set it to 0, or use another recipe")
        elif 2 * count >= layers:
            text = f"{count} at each end leave none of the {model.number('layers')} in FP8"
            yield ctx.error(where, f"{text}; use at most {(layers - 1) // 2}, or remove fp8")
        elif count > layers // pipeline:
            text = f"{count} is more than the {layers // pipeline} layers of a pipeline stage"
            yield ctx.error(where, f"{text}; use at most {layers // pipeline}")


def weights_in_fp8(ctx: ValidationContext) -> Iterator[str]:
    """Combinations with FP8 weights that Megatron and Transformer Engine do not support."""
    for model, key, fp8 in _models(ctx):
        if not fp8.param_gather:
            continue
        where = f"{key}.fp8.param_gather"
        if fp8.recipe == "mxfp8":
            text = "true: Megatron's all-gather buffers do not support MXFP8 weights"
            yield ctx.error(where, f"{text}; set it to false, or use recipe blockwise")
        if model.precision.compute != "bf16":
            text = f"true: Megatron's optimizer treats FP8 weights as bf16, but {key}.compute is"
            yield ctx.error(where, f"{text} {model.precision.compute}; set it to false, or use compute bf16")
        if model.role == "teacher" and derived.teacher_section(ctx.config).offload:
            text = "true: teacher.offload supports bf16 and fp32 weights only"
            yield ctx.error(where, f"{text}; set it to false, or set teacher.offload to false")


def sizes_are_aligned(ctx: ValidationContext) -> Iterator[str]:
    """Both dimensions of each rank's weight shard."""
    for model, key, fp8 in _models(ctx):
        unit, shape, where = _ALIGNMENT[fp8.recipe], model.shape, f"{key}.fp8.recipe"
        made_of = f"at tensor {model.layout.tensor} (hidden {shape.hidden}, heads {shape.heads}, ffn {shape.ffn})"
        for name, sides in linears(shape, model.layout).items():
            for what, side in zip(("outputs", "inputs"), sides, strict=True):
                if side % unit:
                    text = f"{fp8.recipe} requires multiples of {unit}, but the {model.role}'s {name} has {side} {what}"
                    yield ctx.error(where, f"{text} per rank {made_of}; nearest valid values: {multiples(side, unit)}")
        if fp8.recipe == "blockwise" and model.layout.sequence and shape.hidden % _BLOCK:
            text = f"blockwise with sequence parallelism requires that {_BLOCK} divides {model.number('hidden')}"
            yield ctx.error(where, f"{text}; nearest valid values: {multiples(shape.hidden, _BLOCK)}")


def tokens_are_aligned(ctx: ValidationContext) -> Iterator[str]:
    """The tokens of a micro-batch are a dimension of the input, and of both operands of the weight gradient."""
    config = ctx.config
    for model, key, fp8 in _models(ctx):
        size = config.train.micro_batch if model.role == "student" else derived.teacher_micro_batch(config)
        shards = model.layout.context * (model.layout.tensor if model.layout.sequence else 1)
        unit = _BLOCK if fp8.recipe == "blockwise" and model.layout.sequence else _ALIGNMENT[fp8.recipe]
        tokens = size * config.data.sequence_length // shards
        if tokens % unit:
            product = f"micro_batch {size} * sequence_length {config.data.sequence_length} / {shards}"
            text = (
                f"{fp8.recipe} requires a multiple of {unit} tokens per rank; the {model.role} has {tokens} = {product}"
            )
            yield ctx.error(f"{key}.fp8.recipe", f"{text}; nearest valid values: {multiples(tokens, unit)}")


def gpus_have_the_kernels(ctx: ValidationContext) -> Iterator[str]:
    """A recipe requires certain GPU generations; unknown in --check without --check-capability."""
    capability = ctx.capability
    for _, key, fp8 in _models(ctx):
        if capability is None or runs_on(fp8.recipe, capability):
            continue
        able = [name for name in CAPABILITY if runs_on(name, capability)]
        hint = f"valid values: {', '.join(able)}" if able else "these GPUs do not support FP8: remove fp8"
        needed = generations(fp8.recipe)
        text = f"{fp8.recipe} needs compute capability {needed}, the GPUs have {_version(capability)}; {hint}"
        yield ctx.error(f"{key}.fp8.recipe", text)


def runs_on(recipe: str, capability: tuple[int, int]) -> bool:
    """Whether GPUs of a compute capability have a recipe's kernels."""
    return CAPABILITY[recipe] <= capability < _TOO_NEW.get(recipe, (1 << 10, 0))


def generations(recipe: str) -> str:
    """Compute capabilities that have a recipe's kernels, in words."""
    below = _TOO_NEW.get(recipe)
    return f"{_version(CAPABILITY[recipe])} {'or newer' if below is None else f'and below {_version(below)}'}"


def _version(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


CHECKS = (
    needs_transformer_engine,
    options_are_read,
    delayed_scales_are_learned,
    first_and_last_layers,
    weights_in_fp8,
    sizes_are_aligned,
    tokens_are_aligned,
    gpus_have_the_kernels,
)
