"""What FP8 asks of a configuration: which combinations run, and how many matrix products they put into 8 bits.

Transformer Engine and Megatron accept some of what is refused here and fail hours later, or ignore it. Sizes are those
of Transformer Engine 2.11 on Hopper and Blackwell, whose GEMMs read rows of 16 bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.schema import FP8, Layout, ModelShape, Precision
from megatron_capgap.config.validation.context import ModelContext, ValidationContext, multiples

# The least compute capability of the GPUs that have each recipe's kernels.
CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
# And the first that have them no longer: Transformer Engine 2.11 lacks a layout of MXFP8 products there.
_TOO_NEW = {"mxfp8": (12, 0)}
# Numbers that the sides of a linear's local weight and input are multiples of.
_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# Under sequence parallelism blockwise quantises the local part of the input before it is gathered.
_BLOCK = 128
_LINEARS = 4  # of one layer: qkv, proj, fc1, fc2


@dataclass(frozen=True)
class GemmCount:
    """Matrix products of linears in one micro-batch: transformer layers' and, for a student, the LM head's."""

    fp8: int
    others: int


def gemm_count(precision: Precision, shape: ModelShape, *, trains: bool) -> GemmCount:
    """How many matrix products run in FP8; a forward pass has one for each linear, a backward pass two more.

    Args:
        precision: the model's.
        shape: the model in numbers.
        trains: whether there is a backward pass.
    """
    passes = 3 if trains else 1
    layers = layers_in_fp8(precision, shape)
    return GemmCount(fp8=passes * _LINEARS * layers, others=passes * (_LINEARS * (shape.layers - layers) + 1))


def layers_in_fp8(precision: Precision, shape: ModelShape) -> int:
    """How many of the model's layers have their linears in FP8."""
    return max(0, shape.layers - 2 * precision.fp8.first_last_layers_bf16) if precision.fp8 else 0


def linears(shape: ModelShape, layout: Layout) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the local weight of each linear of a layer."""
    width = derived.head_dim(shape)
    query, key_value = shape.heads * width, derived.kv_heads(shape) * width
    tensor = layout.tensor
    return {
        "qkv": ((query + 2 * key_value) // tensor, shape.hidden),
        "proj": (shape.hidden, query // tensor),
        "fc1": ((2 if ARCHITECTURES[shape.family].gated else 1) * shape.ffn // tensor, shape.hidden),
        "fc2": (shape.hidden, shape.ffn // tensor),
    }


def _models(ctx: ValidationContext) -> Iterator[tuple[ModelContext, str, FP8]]:
    """Every model with FP8, the key of its precision, and its FP8."""
    return ((m, m.precision_key, m.precision.fp8) for m in ctx.models if m.precision.fp8 is not None)


def _forward_only(ctx: ValidationContext, model: ModelContext) -> bool:
    return model.role == "teacher" or ctx.stage == "evaluate"


def needs_transformer_engine(ctx: ValidationContext) -> Iterator[str]:
    """Megatron's local layers have no FP8."""
    for model, key, _ in _models(ctx):
        if model.precision.engine == "local":
            text = "local has no FP8; transformer_engine or auto would do, or no fp8"
            yield ctx.error(f"{key}.engine", text)


def options_are_read(ctx: ValidationContext) -> Iterator[str]:
    """Only delayed scaling has a history."""
    defaults = FP8(recipe="delayed")
    for _, key, fp8 in _models(ctx):
        for name in ("amax_history", "amax_algorithm"):
            given = getattr(fp8, name)
            if fp8.recipe != "delayed" and given != getattr(defaults, name):
                text = f"{given}: recipe {fp8.recipe} keeps no history, so nothing reads this; remove the key"
                yield ctx.error(f"{key}.fp8.{name}", text)


def delayed_scales_are_learned(ctx: ValidationContext) -> Iterator[str]:
    """Transformer Engine updates delayed scales in training alone; without it every tensor would be cast as it is."""
    for model, key, fp8 in _models(ctx):
        if fp8.recipe == "delayed" and _forward_only(ctx, model):
            text = f"delayed: its scales are learned in training, and the {model.role} only runs forward here"
            yield ctx.error(f"{key}.fp8.recipe", f"{text}; tensorwise or blockwise would do")


def first_and_last_layers(ctx: ValidationContext) -> Iterator[str]:
    """Layers outside FP8 lie within the first and last pipeline stage, leave some for FP8, and exclude delayed."""
    for model, key, fp8 in _models(ctx):
        count, layers, pipeline = fp8.first_last_layers_bf16, model.shape.layers, model.layout.pipeline
        where = f"{key}.fp8.first_last_layers_bf16"
        if count and fp8.recipe == "delayed":
            text = f"{count}: recipe delayed has one scaling context for all layers"
            yield ctx.error(where, f"{text}; 0 would do, or another recipe")
        elif 2 * count >= layers:
            text = f"{count} at either end leave none of the {model.number('layers')} in FP8"
            yield ctx.error(where, f"{text}; at most {(layers - 1) // 2} would do, or no fp8")
        elif count > layers // pipeline:
            text = f"{count} is more than the {layers // pipeline} layers of a pipeline stage"
            yield ctx.error(where, f"{text}; at most {layers // pipeline} would do")


def weights_in_fp8(ctx: ValidationContext) -> Iterator[str]:
    """What Megatron and Transformer Engine do not do with weights that live in FP8."""
    for model, key, fp8 in _models(ctx):
        if not fp8.param_gather:
            continue
        where = f"{key}.fp8.param_gather"
        if fp8.recipe == "mxfp8":
            text = "true: weights in MXFP8 cannot lie in Megatron's buffers, which it gathers them from"
            yield ctx.error(where, f"{text}; false would do, or recipe blockwise")
        if model.precision.compute != "bf16":
            text = f"true: Megatron's optimizer takes FP8 weights for bf16 ones, and {key}.compute is"
            yield ctx.error(where, f"{text} {model.precision.compute}; false would do, or compute bf16")
        if model.role == "teacher" and derived.teacher_section(ctx.config).offload:
            text = "true: teacher.offload moves weights in bf16 or fp32"
            yield ctx.error(where, f"{text}; false would do, or teacher.offload false")


def sizes_are_aligned(ctx: ValidationContext) -> Iterator[str]:
    """The sides of each rank's part of a weight."""
    for model, key, fp8 in _models(ctx):
        unit, shape, where = _ALIGNMENT[fp8.recipe], model.shape, f"{key}.fp8.recipe"
        made_of = f"at tensor {model.layout.tensor} (hidden {shape.hidden}, heads {shape.heads}, ffn {shape.ffn})"
        for name, sides in linears(shape, model.layout).items():
            for what, side in zip(("outputs", "inputs"), sides, strict=True):
                if side % unit:
                    text = f"{fp8.recipe} needs multiples of {unit}, and the {model.role}'s {name} has {side} {what}"
                    yield ctx.error(where, f"{text} a rank {made_of}; {multiples(side, unit)} would do")
        if fp8.recipe == "blockwise" and model.layout.sequence and shape.hidden % _BLOCK:
            text = f"blockwise with sequence parallelism needs a multiple of {_BLOCK} and not {model.number('hidden')}"
            yield ctx.error(where, f"{text}; {multiples(shape.hidden, _BLOCK)} would do")


def tokens_are_aligned(ctx: ValidationContext) -> Iterator[str]:
    """The tokens of a micro-batch are a side of the input, and of both operands of the weight's gradient."""
    config = ctx.config
    for model, key, fp8 in _models(ctx):
        size = config.train.micro_batch if model.role == "student" else derived.teacher_micro_batch(config)
        cut = model.layout.tensor if model.layout.sequence else 1
        unit = _BLOCK if fp8.recipe == "blockwise" and model.layout.sequence else _ALIGNMENT[fp8.recipe]
        tokens = size * config.data.sequence_length // cut
        if tokens % unit:
            product = f"micro_batch {size} * sequence_length {config.data.sequence_length} / {cut}"
            text = f"{fp8.recipe} needs a multiple of {unit} tokens a rank; the {model.role} has {tokens} = {product}"
            yield ctx.error(f"{key}.fp8.recipe", f"{text}; {multiples(tokens, unit)} would do")


def gpus_have_the_kernels(ctx: ValidationContext) -> Iterator[str]:
    """A recipe needs certain generations of GPUs; unknown at --check unless --check-capability tells."""
    there = ctx.capability
    for _, key, fp8 in _models(ctx):
        if there is None or runs_on(fp8.recipe, there):
            continue
        able = [name for name in CAPABILITY if runs_on(name, there)]
        hint = f"{' or '.join(able)} would do" if able else "these GPUs have no FP8: remove fp8"
        text = (
            f"{fp8.recipe} needs compute capability {generations(fp8.recipe)}, the GPUs have {_version(there)}; {hint}"
        )
        yield ctx.error(f"{key}.fp8.recipe", text)


def runs_on(recipe: str, capability: tuple[int, int]) -> bool:
    """Whether GPUs of a compute capability have a recipe's kernels."""
    return CAPABILITY[recipe] <= capability < _TOO_NEW.get(recipe, (1 << 10, 0))


def generations(recipe: str) -> str:
    """The compute capabilities that have a recipe's kernels, in words."""
    most = _TOO_NEW.get(recipe)
    return f"{_version(CAPABILITY[recipe])} {'or newer' if most is None else f'and below {_version(most)}'}"


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
