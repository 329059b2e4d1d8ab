"""Constraints of student.recompute. Each is one function of `CHECKS`."""

from collections.abc import Iterator
from dataclasses import replace
from math import gcd

from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.validation.context import CheckedModel, ValidationContext, divisors

_KEY = "student.recompute"


def only_whole_layers_are_counted(ctx: ValidationContext) -> Iterator[str]:
    """`layers` and `every` are two ways to choose among whole layers."""
    wanted = ctx.config.student.recompute
    if wanted is None:
        return
    if wanted.what == "mlp":
        for name in ("layers", "every"):
            if getattr(wanted, name) != getattr(Recompute("mlp"), name):
                text = f"{getattr(wanted, name)}: what: mlp recomputes the feed-forward layer of every layer"
                yield ctx.error(f"{_KEY}.{name}", f"{text}; remove the key, or set what to full")
    elif wanted.layers is not None and wanted.every != 1:
        text = f"{wanted.every}: with layers {wanted.layers} each layer is recomputed from its own input"
        yield ctx.error(f"{_KEY}.every", f"{text}; remove one of the two keys")


def feed_forward_layers_have_no_biases(ctx: ValidationContext) -> Iterator[str]:
    """Megatron's feed-forward layer returns its bias, a weight, as an output of the recomputed part: the backward pass
    would never end."""
    wanted, model = _used(ctx), _trained(ctx)
    if wanted is not None and wanted.what == "mlp" and ARCHITECTURES[model.shape.family].linear_bias:
        families = ", ".join(name for name, traits in ARCHITECTURES.items() if not traits.linear_bias)
        text = f"mlp: {model.shape.family} has linear biases; set it to full, or use a family without ({families})"
        yield ctx.error(f"{_KEY}.what", text)


def recomputed_layers_exist(ctx: ValidationContext) -> Iterator[str]:
    """Layers are counted within a model chunk: the layers of one virtual stage on one rank."""
    wanted, model, layout = _used(ctx), _trained(ctx), ctx.config.student.layout
    if ctx.stage == "prune":
        layout = replace(layout, virtual_pipeline=1)  # scoring has no virtual stages
    chunks = derived.chunk_layers(model.shape.layers, layout)
    if wanted is None or wanted.what != "full" or sum(chunks) != model.shape.layers:
        return  # checks.layers_fill_the_pipeline reports the rest
    most = max(chunks)
    if wanted.layers is not None and wanted.layers > most:
        text = f"{wanted.layers} is more than the {most} layers of a model chunk; valid values: 1 to {most}, or null"
        yield ctx.error(f"{_KEY}.layers", text)
    if wanted.layers is None and any(chunk % wanted.every for chunk in chunks):
        numbers = " and ".join(map(str, sorted(set(chunks))))
        text = f"{wanted.every} does not divide the {numbers} layers of a model chunk; valid values: "
        yield ctx.error(f"{_KEY}.every", text + divisors(gcd(*chunks)))


def _used(ctx: ValidationContext) -> Recompute | None:
    """student.recompute, if the stage has a backward pass."""
    forward_only = ctx.config.prune is not None and ctx.config.prune.importance != "gradient"
    if ctx.stage == "evaluate" or (ctx.stage == "prune" and forward_only):
        return None
    return ctx.config.student.recompute


def _trained(ctx: ValidationContext) -> CheckedModel:
    """The model that is recomputed: the student, or the teacher where prune scores it."""
    return ctx.models[-1] if ctx.stage == "prune" else ctx.models[0]


CHECKS = (only_whole_layers_are_counted, feed_forward_layers_have_no_biases, recomputed_layers_exist)
