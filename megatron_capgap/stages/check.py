"""--check: describes a run without torch and without the hardware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_capgap.config import derived
from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.config.schema import Layout, ModelShape
from megatron_capgap.config.validation import fp8
from megatron_capgap.models import memory, size
from megatron_capgap.models.logits import Logits
from megatron_capgap.planning import report as planning_report
from megatron_capgap.planning.case import Case
from megatron_capgap.planning.gpus import Gpu, gpu_named
from megatron_capgap.planning.options import UTILISATION, PlanningOptions
from megatron_capgap.stages.plan import Outline
from megatron_capgap.stages.resolve import data_file, described_by_numbers, outline, resolve, shape_of_student

_MIB = 1 << 20


def report(
    loaded: LoadedConfig,
    stage: str,
    world: int,
    capability: tuple[int, int] | None = None,
    planning: PlanningOptions | None = None,
) -> str:
    """Resolves and validates a configuration; reports parameters, rank grid, tokens per step and memory per rank.

    Args:
        loaded: the configuration.
        stage: the stage to run.
        world: actual or assumed number of ranks.
        capability: compute capability of the target GPUs; None skips the check of FP8 recipes against it.
        planning: GPU, utilisation and price; or a number of GPUs to search layouts for.

    Raises:
        UserError: any error that would stop the run before its first step, except errors in the contents of the data.
    """
    if planning is not None:
        planning_report.require_peak(planning, loaded.config.runtime.peak_tflops)
        if planning.ranks is not None:
            return "\n".join(planning_report.plan_lines(_plan_case(loaded, stage, planning), planning)) + "\n"
        capability = capability or _gpu(loaded, planning).capability
    numbers = planning is not None or described_by_numbers(loaded)
    plan = outline(loaded, stage, world, capability) if numbers else resolve(loaded, stage, world, capability)
    config = plan.config
    lines = [f"{stage}: the configuration is valid", *_missing_data(plan), ""]
    lines += _models(plan)
    ranks = range(plan.student_world)
    lines += ["", *_grid("rank grid", config.student.layout, ranks)]
    if config.teacher is not None and (derived.teacher_layout(config) != config.student.layout or len(ranks) < world):
        lines += _grid("teacher rank grid", derived.teacher_layout(config), derived.teacher_rank_range(config, world))
    lines += stage_work_lines(plan)
    lines += ["", *precision_lines(plan), *_cost_lines(plan)]
    lines += ["", *_memory(plan, on_gpu=planning is not None)]
    if planning is not None:
        lines += ["", *planning_report.check_lines(_case(plan, planning, world), planning)]
    return "\n".join(lines) + "\n"


def _gpu(loaded: LoadedConfig, options: PlanningOptions) -> Gpu:
    return gpu_named(options.gpu or planning_report.DEFAULT_GPU, loaded.config.runtime.peak_tflops)


def _case(plan: Outline, options: PlanningOptions, world: int) -> Case:
    student_of = partial(shape_of_student, plan)
    gpu, utilisation = _gpu(plan.loaded, options), options.utilisation or UTILISATION
    return Case(plan.loaded, plan.stage, world, plan.student, plan.teacher, student_of, gpu, utilisation)


def _plan_case(loaded: LoadedConfig, stage: str, options: PlanningOptions) -> Case:
    """The run on one rank, for its models and everything that does not depend on the layouts searched for."""
    config = loaded.config
    # prune runs the teacher in student.layout, so that the section has none.
    layout = None if stage == "prune" else Layout()
    teacher = config.teacher and replace(
        config.teacher, layout=layout, placement="colocated", ranks=None, ahead=1, micro_batch=None
    )
    student = replace(config.student, layout=Layout(), recompute=None)
    train = replace(config.train, global_batch=None, micro_batch=1)
    one = outline(replace(loaded, config=replace(config, student=student, teacher=teacher, train=train)), stage, 1)
    assert options.ranks is not None
    case = _case(one, options, options.ranks)
    train = replace(train, global_batch=config.train.global_batch)
    return case.changed(replace(one.config, train=train))


def _missing_data(plan: Outline) -> list[str]:
    """Missing data are reported but not refused: they may be on another machine, or not yet prepared."""
    return [
        f"{plan.loaded.location(key)}: {name} does not exist here; the run needs it"
        for key, names in plan.input_files.items()
        for name in names
        if key in plan.loaded.sources and data_file(name) is None
    ]


def _models(plan: Outline) -> list[str]:
    lines = [f"{'model':<9}{'parameters':>16}{'non-embedding':>16}  shape"]
    for name, shape in (("student", plan.student), ("teacher", plan.teacher)):
        if shape is not None:
            lines.append(
                f"{name:<9}{size.parameters(shape):>16,}{size.non_embedding_parameters(shape):>16,}  {_shape(shape)}"
            )
    lines += padding_lines(plan)
    if plan.teacher is not None:
        ratio = plan.teacher_non_embedding_params / plan.student_non_embedding_params
        lines.append(f"capacity gap T/S: {ratio:.2f} (non-embedding parameters); the paper recommends about 2.5")
    return lines


def padding_lines(plan: Outline) -> list[str]:
    """Kept and stored parameters of a student whose layers are zero-padded."""
    lines, stored = [], size.non_embedding_parameters(plan.student)
    if plan.student_non_embedding_params < stored:
        lines.append(
            f"the student keeps {plan.student_non_embedding_params:,} of {stored:,} parameters (non-embedding)"
        )
    if (budget := plan.budget) is not None:
        parts = f"{budget.kv_heads:,} key/value heads and {budget.neurons:,} neurons"
        lines.append(
            f"its layers keep {parts} in total; each layer stores as many as the largest, which the scores determine"
        )
    return lines


def _shape(shape: ModelShape) -> str:
    tied = "tied" if shape.tied_embeddings else "untied"
    heads = f"{shape.heads} heads over {derived.kv_heads(shape)} groups"
    width = f"hidden {shape.hidden}, {heads}, ffn {shape.ffn}"
    return f"{shape.family}: {shape.layers} layers, {width}, vocab {shape.vocab} {tied}"


def _grid(title: str, layout: Layout, ranks: range) -> list[str]:
    """Ranks of each pipeline stage, in Megatron's order: tensor fastest, then context, then data, then
    pipeline."""
    data = derived.data_parallel(layout, len(ranks))
    lines = [
        f"{title}: {len(ranks)} ranks = tensor {layout.tensor}{derived.context_factor(layout)} x data {data} "
        f"x pipeline {layout.pipeline}"
        + (f" ({layout.virtual_pipeline} virtual stages each)" if layout.virtual_pipeline > 1 else "")
        + (", sequence parallel" if layout.sequence else "")
    ]
    for stage in range(layout.pipeline):
        if 2 <= stage < layout.pipeline - 1 and layout.pipeline > 4:
            if stage == 2:
                lines.append("  ...")
            continue
        count = layout.context * data
        first = ranks.start + stage * layout.tensor * count
        groups = [f"[{_span(first + d * layout.tensor, layout.tensor)}]" for d in range(min(count, 4))]
        more = f" ... {count} tensor-parallel groups" if count > 4 else ""
        lines.append(f"  stage {stage}: {' '.join(groups)}{more}")
    return lines


def stage_work_lines(plan: Outline) -> list[str]:
    """How much work each pipeline stage of the student has, and the numbers of layers that balance it."""
    config, shape, layout = plan.config, plan.student, plan.config.student.layout
    if layout.pipeline == 1 or plan.stage in ("prune", "evaluate"):
        return []
    taught = derived.teacher_runs(config, plan.stage) and config.objective.divergence_weight > 0
    head = (plan.teacher.vocab, plan.teacher.hidden) if plan.teacher is not None and taught else None

    def of_mean(layers: Sequence[int]) -> list[float]:
        work = size.stage_work(shape, layers, config.data.sequence_length, head)
        return [len(work) * each / sum(work) for each in work]

    layers = [derived.layers_on_stage(shape.layers, layout, stage) for stage in range(layout.pipeline)]
    now = of_mean(layers)
    shown = [f"{each:.2f}" for each in now]
    if len(shown) > 8:
        shown[4:-2] = ["..."]
    line = f"work of each stage, of their mean: {'  '.join(shown)}"
    best = size.balanced_layers(shape, layout.pipeline, config.data.sequence_length, head)
    if max(of_mean(best)) < 0.99 * max(now):
        line += f"; with student.layout.stage_layers: {best} at most {max(of_mean(best)):.2f}"
        line += " (without virtual stages)" if layout.virtual_pipeline > 1 else ""
    return [line]


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def precision_lines(plan: Outline) -> list[str]:
    """One line per model: compute type, and number of matrix products in FP8."""
    lines = []
    shapes = (("student", plan.student), ("teacher", plan.teacher))
    for (name, shape), precision in zip(shapes, derived.precisions(plan.config), strict=False):
        assert shape is not None
        if plan.stage == "prune" and name == "student":
            continue  # the student does not run
        trains = name == "student" and plan.stage != "evaluate"
        recompute, layout = plan.config.student.recompute, plan.config.student.layout
        again = derived.recomputed_linears(recompute, shape.layers, layout) if trains else []
        count = fp8.gemm_count(precision, shape, trains=trains, again=again)
        line = f"{name} arithmetic: {precision.compute}"
        if precision.fp8 is not None:
            fp8_config = precision.fp8
            line += (
                f" and FP8 ({fp8_config.recipe}, {fp8_config.format}; GPUs with compute capability "
                f"{fp8.generations(fp8_config.recipe)}): {count.fp8} matrix products per micro-batch in FP8, "
                f"{count.others} in {precision.compute}"
            )
        lines.append(line)
    return lines


def _cost_lines(plan: Outline) -> list[str]:
    config, batch = plan.config, plan.global_batch
    length = config.data.sequence_length
    num_microbatches = derived.num_microbatches(config, config.student.layout, plan.student_world)
    teacher = plan.teacher if derived.teacher_runs(config, plan.stage) else None
    flops = size.training_flops(plan.student, teacher, length)
    lines = [
        f"tokens per step: {batch * length:,} = {batch} sequences x {length}; {num_microbatches} "
        f"micro-batch{'es' * (num_microbatches > 1)} of {config.train.micro_batch} per data-parallel rank"
    ]
    if config.prune is not None and plan.teacher is not None:
        tokens = config.prune.batches * batch * length
        # No weight gradients: the backward pass costs as much as the forward pass.
        passes = 2 if config.prune.importance == "gradient" else 1
        flops = passes * size.forward_flops(plan.teacher, length)
        lines.append(f"scores: {config.prune.batches} global batches, {tokens:,} tokens, {tokens * flops:.3g} FLOPs")
    elif config.train.steps is not None and plan.stage != "evaluate":
        tokens = config.train.steps * batch * length
        lines.append(f"run: {config.train.steps:,} steps, {tokens:,} tokens, {tokens * flops:.3g} FLOPs")
    elif plan.stage == "finetune":
        lines.append(f"run: {plan.finetune.epochs} epochs of data.train, whose length determines the number of steps")
    if plan.resume_metadata is not None:
        step, done = plan.resume_metadata.step, plan.stage == "prune" or plan.resume_metadata.step == config.train.steps
        lines.append(f"complete: {config.run_dir}/checkpoints/step_{step}" if done else f"resumes from step {step}")
    return lines


def _memory(plan: Outline, *, on_gpu: bool) -> list[str]:
    config = plan.config
    # Without torch: the driver's device node shows whether `auto` would find a GPU on this machine.
    on_cpu = config.device == "cpu" or (config.device == "auto" and not Path("/dev/nvidiactl").exists())
    on_cpu = on_cpu and not on_gpu
    facts = (config, plan.stage, plan.student, plan.teacher, plan.world)
    ctx = "CPU" if on_cpu else "GPU"
    if on_cpu and config.device == "auto":
        ctx += " (no GPU found; use --device=cuda to estimate for a GPU)"
    lines = [*_fused_loss_lines(plan, on_cpu), f"memory of the fullest rank on a {ctx}, MiB"]
    lines += _rows(memory.estimate(*facts, on_cpu=on_cpu))
    if not derived.teacher_runs(config, plan.stage):
        return lines
    if plan.student_world < plan.world:
        assert plan.teacher is not None, "ranks that are not the student's are a teacher's"
        need = memory.estimate_teacher(config, plan.student, plan.teacher, plan.world)
        lines = ["memory of the teacher's fullest rank, MiB", *_rows(need), "", *lines]
    return [*_teacher_memory_lines(plan), "", *lines]


def _fused_loss_lines(plan: Outline, on_cpu: bool) -> list[str]:
    """Which implementation computes the loss, and in which chunks. A GPU is taken to have Triton, as PyTorch for CUDA
    requires it; the start-up table says what a run has."""
    if plan.stage == "prune":
        return []
    config = plan.config
    logits = Logits(plan.student, config.student.layout, derived.student_precision(config), on_cpu)
    kernels = "eager, torch on blocks of the CPU's caches" if on_cpu else "Triton kernels"
    return [f"fused loss: {kernels}; logits of {logits.chunk_tokens} tokens at a time"]


def _rows(need: memory.Memory) -> list[str]:
    rows = {name: round(value / _MIB, 1) for name, value in need.at_peak().items() if value}
    lines = [f"  {name.replace('_', ' '):<18}{value:>12,.1f}" for name, value in rows.items()]
    lines.append(
        f"  {'total':<18}{sum(rows.values()):>12,.1f}  without the interpreter, its libraries and communication buffers"
    )
    return lines


def _teacher_memory_lines(plan: Outline) -> list[str]:
    """Memory of the teacher's weights and of its stored hidden states."""
    config, teacher = plan.config, plan.teacher
    assert teacher is not None and config.teacher is not None
    stages = range(derived.teacher_layout(config).pipeline)
    shares = [memory.teacher_memory(config, plan.student, teacher, plan.world, None, stage) for stage in stages]
    last = config.student.layout.pipeline - 1
    on_last_stage = memory.teacher_memory(config, plan.student, teacher, plan.world, last, None)
    weights, held = (max(getattr(share, name) for share in shares) / _MIB for name in ("weights", "held"))
    ahead = f"; up to {config.teacher.ahead} stored on the teacher's ranks" * (plan.student_world < plan.world)
    return [
        f"teacher per rank: {weights:,.1f} MiB of weights on its fullest, {on_last_stage.lm_head / _MIB:,.1f} MiB of "
        "LM head on the student's last stage"
        + (", weights in host memory between its forward passes" * config.teacher.offload),
        f"teacher hidden states per global batch: at most {held:,.1f} MiB on each rank of the teacher, "
        f"{on_last_stage.needed / _MIB:,.1f} MiB on each rank of the student's last stage{ahead}",
    ]
