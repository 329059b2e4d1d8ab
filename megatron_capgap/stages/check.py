"""--check: what a run would be, in numbers, without torch and without the hardware."""

from __future__ import annotations

from pathlib import Path

from megatron_capgap.config import derive, fp8
from megatron_capgap.config.load import Loaded
from megatron_capgap.config.schema import Layout, ModelShape
from megatron_capgap.models import memory, size
from megatron_capgap.stages.resolve import Resolved, resolve

_MIB = 1 << 20


def report(loaded: Loaded, stage: str, world: int, capability: tuple[int, int] | None = None) -> str:
    """Resolves and checks a configuration, and tells parameters, rank grid, tokens a step and memory a rank.

    Args:
        loaded: the configuration.
        stage: which stage would run.
        world: number of ranks, real or supposed.
        capability: compute capability of the GPUs that the run is to get; None leaves FP8 recipes unchecked for them.

    Raises:
        UserError: whatever would stop the run before its first step, short of reading the data.
    """
    resolved = resolve(loaded, stage, world, capability)
    config = resolved.config
    lines = [f"{stage}: the configuration is sound", ""]
    lines += _models(resolved)
    lines += ["", *_grid(config.student.layout, world)]
    lines += ["", *arithmetic(resolved), *_work(resolved)]
    lines += ["", *_memory(resolved)]
    return "\n".join(lines) + "\n"


def _models(resolved: Resolved) -> list[str]:
    lines = [f"{'model':<9}{'parameters':>16}{'non-embedding':>16}  shape"]
    for name, shape in (("student", resolved.student), ("teacher", resolved.teacher)):
        if shape is not None:
            lines.append(
                f"{name:<9}{size.parameters(shape):>16,}{size.non_embedding_parameters(shape):>16,}  {_shape(shape)}"
            )
    if resolved.teacher is not None:
        ratio = size.non_embedding_parameters(resolved.teacher) / size.non_embedding_parameters(resolved.student)
        lines.append(
            f"the teacher is {ratio:.2f} times the student (non-embedding); the law of capacity gap advises about 2.5"
        )
    return lines


def _shape(shape: ModelShape) -> str:
    tied = "tied" if shape.tied_embeddings else "untied"
    heads = f"{shape.heads} heads over {derive.kv_heads(shape)} groups"
    width = f"hidden {shape.hidden}, {heads}, ffn {shape.ffn}"
    return f"{shape.family}: {shape.layers} layers, {width}, vocab {shape.vocab} {tied}"


def _grid(layout: Layout, world: int) -> list[str]:
    """Who is who, in Megatron's order: tensor fastest, then data, then pipeline."""
    data = derive.data_parallel(layout, world)
    lines = [
        f"rank grid: {world} ranks = tensor {layout.tensor} x data {data} x pipeline {layout.pipeline}"
        + (f" ({layout.virtual_pipeline} virtual stages each)" if layout.virtual_pipeline > 1 else "")
        + (", sequence parallel" if layout.sequence else "")
    ]
    for stage in range(layout.pipeline):
        if 2 <= stage < layout.pipeline - 1 and layout.pipeline > 4:
            if stage == 2:
                lines.append("  ...")
            continue
        first = stage * layout.tensor * data
        groups = [f"[{_span(first + d * layout.tensor, layout.tensor)}]" for d in range(min(data, 4))]
        more = f" ... {data} tensor-parallel groups" if data > 4 else ""
        lines.append(f"  stage {stage}: {' '.join(groups)}{more}")
    return lines


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def arithmetic(resolved: Resolved) -> list[str]:
    """One line for each model: the type it computes in and how many matrix products run in FP8."""
    lines = []
    shapes = (("student", resolved.student), ("teacher", resolved.teacher))
    for (name, shape), precision in zip(shapes, derive.precisions(resolved.config), strict=False):
        assert shape is not None
        if resolved.stage == "prune" and name == "student":
            continue  # it does not run
        trains = name == "student" and resolved.stage != "evaluate"
        count = fp8.gemm_count(precision, shape, trains=trains)
        line = f"{name} arithmetic: {precision.compute}"
        if precision.fp8 is not None:
            wanted = precision.fp8
            needed = ".".join(map(str, fp8.CAPABILITY[wanted.recipe]))
            line += (
                f" and FP8 ({wanted.recipe}, {wanted.format}; GPUs of compute capability {needed} or newer): "
                f"{count.fp8} matrix products of a micro-batch in FP8, {count.others} in {precision.compute}"
            )
        lines.append(line)
    return lines


def _work(resolved: Resolved) -> list[str]:
    config, batch = resolved.config, resolved.global_batch
    length = config.data.sequence_length
    micro = derive.micro_batches(config, config.student.layout, resolved.world)
    flops = size.training_flops(resolved.student, resolved.teacher, length)
    lines = [
        f"tokens a step: {batch * length:,} = {batch} sequences x {length}; {micro} micro-batches of "
        f"{config.train.micro_batch} on each data-parallel rank"
    ]
    if config.prune is not None and resolved.teacher is not None:
        tokens = config.prune.batches * batch * length
        # Weights want no gradient, so that the backward pass costs what the forward pass does.
        passes = 2 if config.prune.importance == "gradient" else 1
        flops = passes * size.forward_flops(resolved.teacher, length)
        lines.append(
            f"the scores: {config.prune.batches} global batches, {tokens:,} tokens, {tokens * flops:.3g} FLOPs"
        )
    elif config.train.steps is not None and resolved.stage != "evaluate":
        tokens = config.train.steps * batch * length
        lines.append(f"the run: {config.train.steps:,} steps, {tokens:,} tokens, {tokens * flops:.3g} FLOPs")
    if resolved.resumed is not None:
        lines.append(f"it goes on from step {resolved.resumed.step}")
    return lines


def _memory(resolved: Resolved) -> list[str]:
    config = resolved.config
    # Without torch: the driver's device node tells whether `auto` would find a GPU on this machine.
    on_cpu = config.device == "cpu" or (config.device == "auto" and not Path("/dev/nvidiactl").exists())
    need = memory.estimate(config, resolved.stage, resolved.student, resolved.teacher, resolved.world, on_cpu=on_cpu)
    lines = [f"memory of the fullest rank on a {'CPU' if on_cpu else 'GPU'}, MiB"]
    lines += [f"  {name.replace('_', ' '):<18}{value / _MIB:>12,.1f}" for name, value in vars(need).items() if value]
    lines.append(
        f"  {'in all':<18}{need.total / _MIB:>12,.1f}  without the interpreter, its libraries and communication buffers"
    )
    return lines
