"""Compares the outputs of transformers and Megatron on the same tokens, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.checkpoint import loader, metadata, run_directory
from megatron_capgap.common.errors import UserError, in_one_line, not_installed
from megatron_capgap.config.schema import Layout, ModelShape, Precision
from megatron_capgap.config.validation.checks import check_flags
from megatron_capgap.conversion.family import Family
from megatron_capgap.conversion.hf_folder import open_hf_folder
from megatron_capgap.devices import Device
from megatron_capgap.distributed import parallel_context as layouts
from megatron_capgap.distributed.collectives import run_on_all_ranks, run_on_rank0
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models import gpt, pipeline_schedule

SEQUENCES = 2
EMBEDDINGS = -1  # layer number of the input to the first layer


@dataclass(frozen=True)
class Comparison:
    """Differences over all tokens and the complete vocabulary."""

    max_difference: float
    """Largest absolute difference of a logit."""
    largest: float
    """Largest absolute logit of transformers. The tolerance is relative to it, since rounding errors scale with it."""
    mean_difference: float
    """Mean absolute difference of the logits."""
    kl: float
    """Mean over tokens of KL(transformers, Megatron)."""
    greedy: float
    """Share of positions with the same greedy next token."""
    layers: dict[int, float]
    """Largest difference of each layer's output, relative to the largest value in it; -1 for the embeddings."""

    def agrees(self, tolerance: float) -> bool:
        """Whether no logit differs by more than `tolerance` times the largest logit; False for NaN."""
        return self.max_difference <= tolerance * self.largest

    def parting(self, tolerance: float) -> int | None:
        """The first layer whose output differs by more than the tolerance, or None."""
        return next((layer for layer, apart in sorted(self.layers.items()) if not apart <= tolerance), None)

    def text(self, tolerance: float) -> str:
        """A summary, with the first differing layer if they differ."""
        line = (
            f"logits up to {self.largest:.3g}: max difference {self.max_difference:.3g}, mean "
            f"{self.mean_difference:.3g}, KL {self.kl:.3g}, greedy token equal {self.greedy:.2%}"
        )
        if self.agrees(tolerance):
            return f"{line}\nthey agree to {tolerance:g} of the largest"
        layer = self.parting(tolerance)
        where = {None: "after the last layer: final norm or LM head", EMBEDDINGS: "in the embeddings"}
        first = where.get(layer, f"in layer {layer}")
        return f"{line}\nthey differ by more than {tolerance:g} of the largest, first {first}"


@dataclass
class _Trace:
    """Outputs of a forward pass, `[b, s, ...]`."""

    layers: dict[int, Tensor]
    logits: Tensor | None = None


def compare(hf: Path, checkpoint: str, layout: Layout, device: Device, *, tokens: int | None, seed: int) -> Comparison:
    """Runs both models and compares them. Collective.

    Args:
        hf: folder of the transformers model.
        checkpoint: a run directory or RUN/checkpoints/step_N.
        layout: layout of the Megatron model; its size divides the world size.
        device: a CPU device.
        tokens: length of each sequence; None means 64, or the model's maximum if that is shorter.
        seed: seed of the random tokens.

    Raises:
        UserError: a model cannot be opened, or their shapes differ.
    """

    def look() -> tuple[Family, Path, ModelShape]:
        source, folder = open_hf_folder(hf), run_directory.locate(checkpoint)
        shape = metadata.read(folder).model
        _check(source.shape, shape, layout)
        return source.family, folder, shape

    family, folder, shape = run_on_all_ranks(look)
    longest = min(filter(None, (shape.max_positions, shape.attention_window)), default=None)
    tokens = tokens if tokens is not None else min(64, longest or 64)
    if tokens < 1 or tokens > (longest or tokens):
        raise UserError(f"--tokens: {tokens} is not between 1 and the model's {longest} positions")
    ids = torch.randint(shape.vocab, (SEQUENCES, tokens), generator=torch.Generator().manual_seed(seed))
    # One model after the other, so that both need not fit in memory at once.
    theirs = run_on_rank0(lambda: _transformers(hf, family, ids))
    parallel = layouts.build(layout, seed)
    ours = _megatron(folder, shape, parallel, device, ids)
    compared: list[tuple[dict[int, float], dict[str, float] | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(compared, (_layers_apart(theirs, ours), _logits_apart(theirs, ours)))
    layouts.destroy()
    layers = {layer: apart for part, _ in compared for layer, apart in part.items()}
    return Comparison(**next(numbers for _, numbers in compared if numbers), layers=layers)


def _check(theirs: ModelShape, ours: ModelShape, layout: Layout) -> None:
    for name in ("family", "layers", "hidden", "heads", "ffn", "vocab"):
        if getattr(theirs, name) != getattr(ours, name):
            raise UserError(
                f"--hf has {name} {getattr(theirs, name)}, --checkpoint has {getattr(ours, name)}; compare equal models"
            )
    check_flags(ours, layout, dist.get_world_size())


def _transformers(hf: Path, family: Family, ids: Tensor) -> _Trace:
    """Runs the reference; rank 0 only."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UserError(not_installed("transformers", "hf")) from None
    logging.disable_progress_bar()
    how = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    try:  # fp32, regardless of the type in config.json
        model, info = _with_loading_info(
            AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, output_loading_info=True, **how)
        )
    except Exception as error:  # its config checks raise many types
        reason = in_one_line(error, 300)
        raise UserError(f"{hf}: transformers does not load it ({reason}); fix the folder") from error
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise UserError(f"{hf}: transformers finds {', '.join(wrong)} missing or unexpected; give a complete model")
    model.eval()
    name = next(mapping.hf[0] for mapping in family.mappings if "{layer}" in mapping.hf[0]).split(".{layer}")[0]
    trace = _Trace({})
    layers = model.get_submodule(name)
    assert isinstance(layers, torch.nn.ModuleList), f"{name} of {hf}"
    with torch.no_grad(), _watched(list(layers), range(10**6), trace.layers, lambda x: x):
        trace.logits = model(input_ids=ids, use_cache=False).logits
    return trace


def _with_loading_info(loaded: Any) -> tuple[torch.nn.Module, dict[str, Collection[str]]]:
    """What `output_loading_info` makes of a call whose annotation speaks of a model alone."""
    model, info = loaded
    return model, info


def _megatron(folder: Path, shape: ModelShape, parallel: ParallelContext, device: Device, ids: Tensor) -> _Trace:
    """Runs this rank's part of the Megatron model; logits on the last stage only."""
    chunks = gpt.build(shape, parallel, Precision(), device, sequence_length=ids.shape[1])
    loader.load_weights(folder, chunks, parallel)
    model = gpt.unwrap(chunks[0]).eval()
    trace = _Trace({})

    def last_stage(hidden: Tensor, batch: Any) -> tuple[Tensor, Tensor, None]:
        shard = hidden @ model.lm_head().t()
        shards = [torch.empty_like(shard) for _ in range(parallel.layout.tensor)]
        dist.all_gather(shards, shard.contiguous(), group=parallel.groups.tp)
        trace.logits = torch.cat(shards, dim=-1)[..., : shape.vocab].transpose(0, 1)
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), None

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    batch = SimpleNamespace(tokens=ids, position_ids=positions, attention_mask=None)
    layers = list(model.decoder.layers)
    numbers = [layer.layer_number - 1 for layer in layers]
    with torch.no_grad(), _watched(layers, numbers, trace.layers, lambda x: x.transpose(0, 1)):
        pipeline_schedule.run(chunks, parallel, [batch], last_stage, forward_only=True, shape=(ids.shape[1], SEQUENCES))
    return trace


@contextmanager
def _watched(layers: list[torch.nn.Module], numbers: Any, kept: dict[int, Tensor], turn: Any) -> Iterator[None]:
    """Records the output of each layer, and the input of the first, within the context."""

    def keep(number: int, hidden: Any) -> None:
        kept[number] = turn(hidden[0] if isinstance(hidden, tuple) else hidden).detach().clone()

    def before(module: Any, args: Any, kwargs: Any) -> None:
        keep(EMBEDDINGS, args[0] if args else kwargs["hidden_states"])

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)] if numbers[0] == 0 else []
    for number, layer in zip(numbers, layers, strict=False):
        handles.append(layer.register_forward_hook(lambda _m, _i, hidden, number=number: keep(number, hidden)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers_apart(theirs: _Trace, ours: _Trace) -> dict[int, float]:
    return {
        layer: ((hidden - theirs.layers[layer]).abs().max() / theirs.layers[layer].abs().max()).item()
        for layer, hidden in ours.layers.items()
    }


def _logits_apart(theirs: _Trace, ours: _Trace) -> dict[str, float] | None:
    if ours.logits is None:
        return None
    assert theirs.logits is not None
    apart = (ours.logits - theirs.logits).abs()
    expected, found = theirs.logits.double().log_softmax(-1), ours.logits.double().log_softmax(-1)
    return {
        "max_difference": apart.max().item(),
        "largest": theirs.logits.abs().max().item(),
        "mean_difference": apart.mean().item(),
        "kl": (expected.exp() * (expected - found)).sum(-1).mean().item(),
        "greedy": (expected.argmax(-1) == found.argmax(-1)).double().mean().item(),
    }
