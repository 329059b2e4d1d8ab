"""Models of transformers with masks of ones on their heads, neurons, channels and layers: what importance must equal.

Written out in float64 with autograd, one micro-batch at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """The modules of a model, by what they do."""

    embed: Any
    layers: list[Any]
    """(norm, attention, its output projection, norm, feed-forward, its output projection) each."""
    norm: Any
    head: Any
    attend: Any
    """(attention module, normalised hidden states) to its output."""
    parallel: bool = False


def parts_of(model: PreTrainedModel) -> Parts:
    """Takes a model of a family apart."""
    kind = model.config.model_type
    if kind == "gpt2":
        inner = model.transformer
        layers = [(b.ln_1, b.attn, b.attn.c_proj, b.ln_2, b.mlp, b.mlp.c_proj) for b in inner.h]

        def embed(tokens: Tensor) -> Tensor:
            return inner.wte(tokens) + inner.wpe(torch.arange(tokens.shape[1]))

        return Parts(embed, layers, inner.ln_f, model.lm_head, lambda module, x: module(x)[0])
    inner = model.gpt_neox if kind == "gpt_neox" else model.model

    def attend(module: Any, x: Tensor) -> Tensor:
        turns = inner.rotary_emb(x, position_ids=torch.arange(x.shape[1])[None])
        return module(hidden_states=x, position_embeddings=turns, attention_mask=None)[0]

    if kind == "gpt_neox":
        layers = [
            (b.input_layernorm, b.attention, b.attention.dense, b.post_attention_layernorm, b.mlp, b.mlp.dense_4h_to_h)
            for b in inner.layers
        ]
        return Parts(
            inner.embed_in, layers, inner.final_layer_norm, model.get_output_embeddings(), attend, parallel=True
        )
    layers = [
        (b.input_layernorm, b.self_attn, b.self_attn.o_proj, b.post_attention_layernorm, b.mlp, b.mlp.down_proj)
        for b in inner.layers
    ]
    return Parts(inner.embed_tokens, layers, inner.norm, model.lm_head, attend)


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Heads, groups, neurons, channels and layers of a model."""
    config, parts = model.config, parts_of(model)
    _, _, out, _, _, down = parts.layers[0]
    heads = config.num_attention_heads
    return {
        "heads": heads,
        "groups": getattr(config, "num_key_value_heads", None) or heads,
        "neurons": inputs_of(down),
        "channels": config.hidden_size,
        "layers": len(parts.layers),
        "context": inputs_of(out),
    }


def inputs_of(linear: Any) -> int:
    """Columns that a projection reads; GPT-2 keeps its matrices the other way round."""
    return linear.weight.shape[0] if hasattr(linear, "nf") else linear.weight.shape[1]


def reading(linear: Any) -> Tensor:
    """Length of the weights that read each column."""
    return linear.weight.norm(dim=1 if hasattr(linear, "nf") else 0)


def masks_of(model: PreTrainedModel) -> Sums:
    """Ones that want gradients."""
    n = sizes(model)
    shapes = {name: (n["layers"], n[name]) for name in ("heads", "groups", "neurons")}
    shapes |= {"channels": (n["channels"],), "layers": (n["layers"],)}
    return {name: torch.ones(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}


@contextmanager
def scaled_inputs(module: Any, factors: Tensor) -> Iterator[None]:
    """Multiplies what a projection reads."""
    hook = module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factors,))
    yield
    hook.remove()


def logits_of(model: PreTrainedModel, tokens: Tensor, masks: Sums) -> Tensor:
    """Logits `[b, s, v]` with masks in their places."""
    parts, n, mu = parts_of(model), sizes(model), masks["channels"]
    width, queries = n["context"] // n["heads"], n["heads"] // n["groups"]
    x = parts.embed(tokens) * mu
    for i, (norm, attention, out, second_norm, mlp, down) in enumerate(parts.layers):
        of_heads = masks["heads"][i] * masks["groups"][i].repeat_interleave(queries)
        with scaled_inputs(out, of_heads.repeat_interleave(width)), scaled_inputs(down, masks["neurons"][i]):
            added = parts.attend(attention, norm(x)) * mu * masks["layers"][i]
            if parts.parallel:
                x = (x + added + mlp(second_norm(x)) * mu * masks["layers"][i]) * mu
                continue
            x = (x + added) * mu
            x = (x + mlp(second_norm(x)) * mu * masks["layers"][i]) * mu
    return parts.head(parts.norm(x))


def by_gradients(model: PreTrainedModel, micro_batches: list[Tensor]) -> Sums:
    """Sums over micro-batches `[b, s + 1]` of |d mean loss / d mask|."""
    masks = masks_of(model)
    sums = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for rows in micro_batches:
        logits = logits_of(model, rows[:, :-1], masks)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        for name, gradient in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
            sums[name] += gradient.abs()
    return {name: total.detach() for name, total in sums.items()}


@torch.no_grad()
def by_activations(model: PreTrainedModel, micro_batches: list[Tensor]) -> Sums:
    """Sums over tokens: of what heads and neurons send on, of the channels' size behind the norms, of turned angles."""
    parts, n = parts_of(model), sizes(model)
    sums = {name: torch.zeros_like(mask) for name, mask in masks_of(model).items()}
    seen: dict[Any, Tensor] = {}
    watched = [module for layer in parts.layers for module in (layer[2], layer[5])]
    hooks = [m.register_forward_pre_hook(lambda m, inputs: seen.__setitem__(m, inputs[0])) for m in watched]
    for rows in micro_batches:
        x = parts.embed(rows[:, :-1])
        for i, (norm, attention, out, second_norm, mlp, down) in enumerate(parts.layers):
            before = x
            added = parts.attend(attention, norm(before))
            middle = before if parts.parallel else before + added
            x = before + added + mlp(second_norm(middle))
            sent = (seen[out].abs() * reading(out)).sum((0, 1))
            sums["heads"][i] += sent.view(n["heads"], -1).sum(-1)
            sums["groups"][i] += sent.view(n["groups"], -1).sum(-1)
            sums["neurons"][i] += (seen[down].abs() * reading(down)).sum((0, 1))
            sums["channels"] += norm(before).abs().sum((0, 1)) + second_norm(middle).abs().sum((0, 1))
            sums["layers"][i] += (1 - F.cosine_similarity(before, x, dim=-1)).sum()
        sums["channels"] += parts.norm(x).abs().sum((0, 1))
    for hook in hooks:
        hook.remove()
    return sums
