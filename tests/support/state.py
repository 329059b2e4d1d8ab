"""A run's state as bytes, to be compared, and batches that no run learns from."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_capgap.cli import main
from tests.support.engine import start


class NaNGradient(torch.autograd.Function):
    """Leaves a tensor as it is and makes NaN of its gradient."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def state_of(run: Any) -> list[bytes]:
    """This rank's weights, Adam's moments and step counters, and the scales of `scales_of`."""
    parts = [parameter.detach() for chunk in run.chunks for parameter in chunk.parameters()]
    for part in run.optimizer.optimizer.chained_optimizers:
        parts += [entry[name].detach() for entry in part.optimizer.state.values() for name in sorted(entry)]
    return [tensor.numpy().tobytes() for tensor in parts] + scales_of(run)


def scales_of(run: Any) -> list[bytes]:
    """Scales and histories of the modules that delay them."""
    metas = [getattr(module, "fp8_meta", {}) for chunk in run.chunks for module in chunk.modules()]
    states = [meta[part] for meta in metas for part in ("scaling_fwd", "scaling_bwd") if part in meta]
    delayed = [state for state in states if hasattr(state, "amax_history")]
    return [tensor.numpy().tobytes() for state in delayed for tensor in (state.scale, state.amax_history)]


def kinds_of(run: Any) -> dict[str, tuple[str, float]]:
    """Of every parameter that has a master: its class, and how far it is from it at most, relative to its largest."""
    from megatron_capgap.models.gpt import unwrap  # Megatron, which a worker may have to prepare for first

    found = {}
    for chunk in run.chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            master = parameter.main_param.detach().float().flatten()
            off = (parameter.detach().float().flatten() - master).abs().max() / master.abs().max()
            found[name] = type(parameter).__name__, off.item()
    return found


def written_of(run: Any) -> dict[str, tuple[str, str]]:
    """Of every weight that lives in FP8: the device and type of what this rank gives to a checkpoint in its place."""
    from megatron_capgap.checkpoint import loader
    from megatron_capgap.models.gpt import unwrap

    state = loader.training_state(run.chunks, run.parallel, run.optimizer, copied=False)()
    held = {name for name, one in unwrap(run.chunks[0]).named_parameters() if type(one).__name__ == "Float8Tensor"}
    return {name: (state["model"][name].data.device.type, str(state["model"][name].data.dtype)) for name in held}


def run_poisoned(
    part: str, steps: list[int], words: list[str], look: Callable[[Any], Any] = state_of
) -> tuple[int, dict[int, Any]]:
    """Runs adapt while the loss of one micro-batch of some steps, or its gradient, is NaN.

    Returns:
        The exit code, and what `look` sees before training (0) and after each step.
    """
    from megatron_capgap.stages import context
    from megatron_capgap.training import loop

    student_step, loss = loop.student_step, context.language_model_loss
    states: dict[int, Any] = {}
    poisoned = []

    def step_and_look(run: loop.TrainingRun, done: int, *rest: Any) -> Any:
        states.setdefault(done, look(run))
        poisoned[:] = [done + 1 in steps]
        try:
            return student_step(run, done, *rest)
        finally:
            states[done + 1] = look(run)

    def poisoned_loss(hidden: torch.Tensor, *rest: Any, **options: Any) -> Any:
        now = poisoned and poisoned.pop()
        out = loss(NaNGradient.apply(hidden) if now and part == "gradient" else hidden, *rest, **options)
        if now and part == "loss":
            out.loss_sum.mul_(float("nan"))
        return out

    loop.student_step, context.language_model_loss = step_and_look, poisoned_loss
    try:
        return main(words), states
    finally:
        loop.student_step, context.language_model_loss = student_step, loss


def run_engine(poisoned: list[int], look: Callable[[Any], Any], words: list[str]) -> Any:
    """As `run_poisoned` with a gradient, of Transformer Engine's layers in a worker that may be fresh."""
    start()
    return run_poisoned("gradient", poisoned, words, look)


def run_scoring(words: list[str]) -> tuple[int, set[str]]:
    """Runs prune in Transformer Engine's layers, in a worker that may be fresh; its exit code, and the classes of the
    teacher's parameters when they are scored."""
    start()
    from megatron_capgap.stages import prune

    importance, seen = prune.Importance, set()

    def look(chunks: Any, *rest: Any, **options: Any) -> Any:
        seen.update(type(parameter).__name__ for chunk in chunks for parameter in chunk.parameters())
        return importance(chunks, *rest, **options)

    prune.Importance = look
    try:
        return main(words), seen
    finally:
        prune.Importance = importance


def run_pickling(words: list[str]) -> int:
    """Runs a stage whose checkpoints hold scales as older ones do: in Transformer Engine's own pickles."""
    start()
    from megatron_capgap.checkpoint import fp8_scales
    from megatron_capgap.models.gpt import unwrap

    def pickled(chunks: Any, parallel: Any) -> dict[str, Any]:
        states = [unwrap(chunk).sharded_state_dict(metadata={"dp_cp_group": parallel.groups.dp_cp}) for chunk in chunks]
        return {
            f"model{index}": {key: value for key, value in state.items() if key.endswith("_extra_state")}
            for index, state in enumerate(states)
        }

    written, fp8_scales.to_save = fp8_scales.to_save, pickled
    try:
        return main(words)
    finally:
        fp8_scales.to_save = written
