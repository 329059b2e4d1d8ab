"""Part teacher: one frozen layer in bf16, in FP8 with one scale a tensor, and either as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.measure import Bench
from gpu_parts.shapes import B8, B70_TP8, TINY
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import size

LENGTH, TINY_LENGTH = 4096, 32
SEQUENCES, TINY_SEQUENCES = (1, 2, 8), (1, 2)
FP8_MAX = 448.0  # the largest number of E4M3
Product = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Layer:
    """A LLaMA layer's forward pass on `[b, s, h]`, its products given: with the norm, sdpa, SwiGLU and the residuals.

    Rotary positions are left out: they do not differ between formats.
    """

    shape: ModelShape
    weights: dict[str, Any]
    """qkv, proj, up (gate and up), down; in the format of `product`."""
    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        hidden = x.shape[-1]
        heads, groups, width = self.shape.heads, self.shape.kv_heads or self.shape.heads, _head_dim(self.shape)
        qkv = self.product(F.rms_norm(x, (hidden,)), self.weights["qkv"])
        query, key, value = (
            part.unflatten(-1, (-1, width)).transpose(1, 2)
            for part in qkv.split([heads * width, groups * width, groups * width], dim=-1)
        )
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups < heads)
        x = x + self.product(found.transpose(1, 2).flatten(2), self.weights["proj"])
        gate, up = self.product(F.rms_norm(x, (hidden,)), self.weights["up"]).chunk(2, dim=-1)
        return x + self.product(F.silu(gate) * up, self.weights["down"])


def run(bench: Bench) -> None:
    """For each shape and number of tokens: rows `bf16`, `fp8`, `bf16, graph`, `fp8, graph`."""
    shapes = {"tiny": TINY} if bench.tiny else {"8B": B8, "70B / TP8": B70_TP8}
    length = TINY_LENGTH if bench.tiny else LENGTH
    for name, shape in shapes.items():
        for sequences in TINY_SEQUENCES if bench.tiny else SEQUENCES:
            bench.check_time()
            with torch.no_grad():
                _measure(bench, f"{name}, {sequences * length} tokens", shape, sequences, length)
            bench.collect()


def _measure(bench: Bench, case: str, shape: ModelShape, sequences: int, length: int) -> None:
    x = bench.randn(sequences, length, shape.hidden)
    weights = _weights(bench, shape)
    layers = {"bf16": Layer(shape, weights, F.linear)}
    eight = bench.attempt("teacher", case, "fp8", lambda: _in_fp8(shape, weights, x))
    if eight is not None:
        layers["fp8"] = eight
    runs: dict[str, Callable[[], object]] = {name: lambda layer=layer: layer(x) for name, layer in layers.items()}
    for name, layer in layers.items():
        if bench.cuda:
            graph = bench.attempt("teacher", case, f"{name}, graph", lambda layer=layer: _captured(layer, x))
            if graph is not None:
                runs[f"{name}, graph"] = graph.replay
        else:
            bench.report.add("teacher", case, f"{name}, graph", absent="not available: CUDA graphs need a GPU")
    one_layer = replace(shape, layers=1, vocab=1)
    flops = size.forward_flops(one_layer, length) * sequences * length
    bench.in_turn("teacher", case, runs, lambda name, seconds, peak: {"flops_per_second": flops / seconds})


def _weights(bench: Bench, shape: ModelShape) -> dict[str, Tensor]:
    hidden, query = shape.hidden, shape.heads * _head_dim(shape)
    key_value = 2 * (shape.kv_heads or shape.heads) * _head_dim(shape)
    sides = {
        "qkv": (query + key_value, hidden),
        "proj": (hidden, query),
        "up": (2 * shape.ffn, hidden),
        "down": (hidden, shape.ffn),
    }
    return {name: bench.randn(*of, scale=0.02, seed=seed) for seed, (name, of) in enumerate(sides.items())}


def _head_dim(shape: ModelShape) -> int:
    return shape.head_dim or shape.hidden // shape.heads


def _in_fp8(shape: ModelShape, weights: dict[str, Tensor], x: Tensor) -> Layer:
    """The layer with products in E4M3: weights cast once, activations in every call (maximum, scale, cast)."""

    cast = torch.compile(_cast, dynamic=True) if x.is_cuda else _cast  # one kernel for the maximum, one for the cast

    def product(values: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        rows, scale = cast(values.flatten(0, -2))
        found = torch._scaled_mm(
            rows, weight[0].t(), scale_a=scale, scale_b=weight[1], out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return found.unflatten(0, values.shape[:-1])

    layer = Layer(shape, {name: _cast(weight) for name, weight in weights.items()}, product)
    layer(x)  # raises where the device cannot multiply in FP8
    return layer


def _cast(values: Tensor) -> tuple[Tensor, Tensor]:
    """(values in E4M3, the number to multiply them with)."""
    scale = values.abs().amax().float().clamp_min(1e-12) / FP8_MAX
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def _captured(layer: Layer, x: Tensor) -> Any:
    """The layer's forward pass as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    return graph
