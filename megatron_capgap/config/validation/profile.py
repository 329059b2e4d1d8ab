"""Constraints on the section `profile`."""

from collections.abc import Callable, Iterator

from megatron_capgap.config.validation.context import ValidationContext


def profiled_steps_are_taken(ctx: ValidationContext) -> Iterator[str]:
    """The steps are in order, and the run has them."""
    if (profile := ctx.config.profile) is None:
        return
    (first, last), steps = profile.steps, ctx.config.train.steps
    if first > last:
        yield ctx.error("profile.steps", f"[{first}, {last}] ends before it starts; use [{last}, {first}]")
    elif steps is not None and last > steps:
        near = max(1, steps - last + first)
        text = f"[{first}, {last}]: the run has train.steps {steps}; for example [{near}, {steps}]"
        yield ctx.error("profile.steps", text)


def profiled_ranks_exist(ctx: ValidationContext) -> Iterator[str]:
    """Ranks are those of the job."""
    profile = ctx.config.profile
    if profile and (beyond := [rank for rank in profile.ranks if rank >= ctx.world]):
        text = f"{beyond[0]} is not a rank of this job; valid values: 0 to {ctx.world - 1}"
        yield ctx.error("profile.ranks", text)


def profiles_have_no_disjoint_teacher(ctx: ValidationContext) -> Iterator[str]:
    """torch's profiler ends the process with a segmentation fault beside the groups that join disjoint roles."""
    teacher = ctx.config.teacher
    if ctx.config.profile and teacher and teacher.placement == "disjoint":
        text = "torch's profiler crashes beside a disjoint teacher; set teacher.placement to colocated"
        yield ctx.error("profile.steps", f"{text}, or remove the section profile")


CHECKS: tuple[Callable[[ValidationContext], Iterator[str]], ...] = (
    profiled_steps_are_taken,
    profiled_ranks_exist,
    profiles_have_no_disjoint_teacher,
)
