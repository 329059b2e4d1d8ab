"""Text of `--check --gpu` and `--plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.schema import Layout
from megatron_capgap.planning import search
from megatron_capgap.planning.case import Case
from megatron_capgap.planning.gpus import GIB, USABLE
from megatron_capgap.planning.levers import levers
from megatron_capgap.planning.options import UTILISATION, PlanningOptions

DEFAULT_GPU = "h100-80"


def check_lines(case: Case, options: PlanningOptions) -> list[str]:
    """Time and cost of a run as configured; with `--gpu` the last line says whether it fits."""
    lines = [*_assumptions(case, options), "", *_time_lines(case, options)]
    if options.gpu is None:
        return lines
    need = case.memory()
    usable = f"{_gib(case.limit)} usable of {case.gpu.gib:.1f} GiB ({case.gpu.name})"
    if need <= case.limit:
        return [*lines, "", f"fits: {_gib(need)} on the fullest rank, {usable}"]
    found = list(levers(case))
    rows = [f"  {name:<44}{_gib(other.memory()):>12}  {_verdict(other)}" for name, other in found]
    enough = next((name for name, other in found if other.memory() <= other.limit), None)
    advice = f"the first lever that suffices: {enough}" if enough else "no lever suffices alone"
    if not enough:
        advice += f"; --plan {case.world} searches for layouts, or use more GPUs"
    title = ["", "levers, each alone: memory of the fullest rank"] if rows else []
    return [*lines, *title, *rows, "", f"does not fit: {_gib(need)} on the fullest rank, {usable}; {advice}"]


def _verdict(case: Case) -> str:
    return "fits" if case.memory() <= case.limit else "does not fit"


def plan_lines(case: Case, options: PlanningOptions) -> list[str]:
    """The best layouts for a number of GPUs, and the YAML lines of the first."""
    config, more = case.config, list[str]()
    if config.train.global_batch is None:
        batch = search.default_batch(case.world, config.data.sequence_length)
        tokens = batch * config.data.sequence_length
        more.append(f"train.global_batch is not set: {batch} sequences, {tokens / 1e6:.1f} million tokens a step")
        case = case.changed(replace(config, train=replace(config.train, global_batch=batch)))
    found = search.search(case)
    lines = [f"{case.stage}: layouts for {case.world} GPUs, {case.gpu.name}", *_assumptions(case, options, more), ""]
    if not found.best:
        return [*lines, _nothing_fits(case, found)]
    lines.append(f"{'':<3}{'step s':>8}{'GiB':>7}  layouts")
    for number, other in enumerate(found.best, 1):
        seconds, nbytes = other.step().total, other.memory()
        lines.append(f"{number:<3}{seconds:>8.3g}{nbytes / GIB:>7.1f}  {_described(other)}")
    best = found.best[0]
    lines += ["", "the first:", *_time_lines(best, options), "", *search.yaml_lines(best.config)]
    return lines


def _nothing_fits(case: Case, found: search.Found) -> str:
    batch = case.config.train.global_batch or 0
    if found.nearest is not None:
        need = found.nearest.memory()
        where = f"{_gib(need - case.limit)} are missing of {_gib(need)}"
        return f"does not fit on {case.world} GPUs; the nearest: {_described(found.nearest)}; {where}; use more GPUs"
    nearest = max(1, round(batch / case.world)) * case.world
    other = case.changed(replace(case.config, train=replace(case.config.train, global_batch=nearest)))
    if nearest != batch and (again := search.search(other)).best:
        return (
            f"does not fit: no layout of {case.world} GPUs divides train.global_batch {batch}; the nearest: "
            f"train.global_batch {nearest} with {_described(again.best[0])}"
        )
    reasons = "; ".join(case.changed(case.config).problems()[:1]) or "the models' dimensions allow none"
    return f"does not fit: no valid layout for {case.world} GPUs and train.global_batch {batch}; {reasons}"


def _described(case: Case) -> str:
    config = case.config
    words = [f"student {_layout(config.student.layout)}, micro-batch {config.train.micro_batch}"]
    if config.student.recompute is not None:
        words.append(f"recompute {config.student.recompute.what}")
    if case.taught is not None:
        teacher = derived.teacher_section(config)
        where = f"{teacher.ranks} ranks of its own" if teacher.ranks else "colocated"
        size = derived.teacher_micro_batch(config)
        words.append(f"teacher {_layout(derived.teacher_layout(config))}, micro-batch {size}, {where}")
    return ", ".join(words)


def _layout(layout: Layout) -> str:
    virtual = f" x {layout.virtual_pipeline} virtual" if layout.virtual_pipeline > 1 else ""
    return f"tensor {layout.tensor} x pipeline {layout.pipeline}{virtual}"


def _assumptions(case: Case, options: PlanningOptions, more: Sequence[str] = ()) -> list[str]:
    said = [*case.loaded.assumptions, *more]
    said += [f"{name}: {text}" for name, text in _arithmetic(case)]
    if options.utilisation is None:
        said.append(f"products reach {UTILISATION:g} of the peak while a rank computes (--utilisation)")
    if options.gpu is None:
        said.append(f"GPUs are {DEFAULT_GPU} (--gpu)")
    elif case.gpu.capability is None:
        said.append(f"rates and bandwidths are those of {DEFAULT_GPU}")
    said.append(f"{100 * (1 - USABLE):.0f}% of a GPU's memory is for the CUDA context, NCCL and fragmentation")
    said.append(f"{case.gpu.per_node} GPUs a node; tensor parallelism stays within")
    return ["assumptions", *(f"  {sentence}" for sentence in said)]


def _arithmetic(case: Case) -> list[tuple[str, str]]:
    """The arithmetic of each model, which decides its rate."""
    config = case.config
    models = [("student", derived.student_precision(config))]
    if config.teacher is not None:
        models.append(("teacher", derived.teacher_precision(config)))
    return [
        (name, f"{'FP8' if each.fp8 else each.compute}, {case.gpu.peak(each):,.0f} TFLOP/s at the peak")
        for name, each in models
    ]


def _time_lines(case: Case, options: PlanningOptions) -> list[str]:
    step = case.step()
    milliseconds = {name: round(1000 * value, 1) for name, value in vars(step).items()}
    lines = [f"predicted time of a step on {case.world} GPUs ({case.gpu.name}), ms"]
    lines += [f"  {name.replace('_', ' '):<20}{value:>12,.1f}" for name, value in milliseconds.items() if value]
    lines.append(f"  {'total':<20}{sum(milliseconds.values()):>12,.1f}")
    ranks = derived.student_world(case.config, case.world)
    batch = derived.global_batch(case.config, case.config.student.layout, ranks)
    tokens = batch * case.config.data.sequence_length
    lines.append(f"  {tokens / step.total:,.0f} tokens per second")
    if (steps := case.steps) is None:
        lines.append("train.steps is not set: no length of the run")
        return lines
    days = steps * step.total / 86400
    hours = 24 * days * case.world
    price = options.gpu_hour_price
    cost = f", cost {hours * price:,.2f} at {price:g} per GPU-hour" if price is not None else ""
    lines.append(f"run: {steps:,} steps, {days:,.3g} days, {hours:,.1f} GPU-hours{cost}")
    return lines


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:,.2f} GiB"


def require_peak(options: PlanningOptions, peak_tflops: float | None) -> None:
    """A utilisation or a price needs a peak.

    Raises:
        UserError: neither `--gpu` nor `--plan` nor runtime.peak_tflops is given.
    """
    if options.gpu is None and options.ranks is None and peak_tflops is None:
        name = "--utilisation" if options.utilisation is not None else "--gpu-hour-price"
        raise UserError(f"{name}: no GPU is given; add --gpu {DEFAULT_GPU}, or set runtime.peak_tflops")
