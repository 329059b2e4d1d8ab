"""Transformer Engine's Linear and LayerNormLinear on the CPU: which operands and formats their three products use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import fp8_reference as reference
from tests.support.engine import RECIPES, needs_files, start
from tests.support.fp8_reference import Array
from tests.support.pool import WorkerPool

TOKENS, IN, OUT, STEPS = 144, 256, 128, 4  # tokens are no multiple of a blockwise tile
SHAPES = {"mxfp8": (160, IN, OUT)}
FORMATS = {"hybrid": (reference.E4M3, reference.E5M2), "e4m3": (reference.E4M3, reference.E4M3)}
NAMES = {"hybrid": ("e4m3", "e5m2"), "e4m3": ("e4m3", "e4m3")}


@dataclass(frozen=True)
class Module:
    """One layer and how it is run."""

    recipe: str | None
    format: str = "hybrid"
    bf16: bool = False
    bias: bool = False
    norm: str | None = None
    length: int = 1
    algorithm: str = "most_recent"
    sequence_parallel: str | None = None
    """column or row: over two ranks."""


def recipe_of(module: Module) -> Any:
    """Transformer Engine's recipe object."""
    from transformer_engine.common import recipe

    if module.recipe is None:
        return None
    target = {"hybrid": recipe.Format.HYBRID, "e4m3": recipe.Format.E4M3}[module.format]
    if module.recipe == "delayed":
        history = {"amax_history_len": module.length, "amax_compute_algo": module.algorithm}
        return recipe.DelayedScaling(fp8_format=target, **history)
    classes = {
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }
    return classes[module.recipe](fp8_format=target)


def fixtures(module: Module, step: int) -> dict[str, Tensor]:
    """Input `[tokens, in]`, weight `[out, in]`, bias, and the output's gradient `[tokens, out]` of one step."""
    tokens, inner, outer = SHAPES.get(module.recipe or "", (TOKENS, IN, OUT))
    if module.sequence_parallel:
        tokens, inner, outer = 256, 256, 256
    generator = torch.Generator().manual_seed(step)
    sizes = {"x": (tokens, inner), "w": (outer, inner), "b": (outer,), "dy": (tokens, outer), "gain": (inner,)}
    made = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    made["dy"] *= 10.0 ** -(step + 2)
    made["x"] *= 1.0 + 3.0 * step
    return {name: values.bfloat16() if module.bf16 else values for name, values in made.items()}


def run_module(module: Module) -> list[dict[str, Any]]:
    """A few steps; what went in and came out of each, the products, and the state of delayed scaling after it."""
    start()
    import transformer_engine.pytorch as te

    from megatron_capgap.devices.transformer_engine_cpu import counts, reset_counts

    torch.set_num_threads(1)
    first = fixtures(module, 0)
    options: dict[str, Any] = {"bias": module.bias, "device": "cpu", "params_dtype": first["w"].dtype}
    if module.norm is None:
        layer = te.Linear(first["w"].shape[1], first["w"].shape[0], **options)
    else:
        layer = te.LayerNormLinear(first["w"].shape[1], first["w"].shape[0], normalization=module.norm, **options)
    found = []
    for step in range(STEPS):
        given = fixtures(module, step)
        with torch.no_grad():
            layer.weight.copy_(given["w"])
            if module.bias:
                layer.bias.copy_(given["b"])
            if module.norm:
                layer.layer_norm_weight.copy_(given["gain"])
        layer.zero_grad()
        reset_counts()
        x = given["x"].clone().requires_grad_()
        with te.fp8_autocast(enabled=module.recipe is not None, fp8_recipe=recipe_of(module)):
            y = layer(x)
        y.backward(given["dy"])
        out = {
            "y": y.detach(),
            "dx": x.grad,
            "dw": layer.weight.grad,
            "gemms": {tuple(g): n for g, n in counts().items()},
        }
        out |= {"db": layer.bias.grad.clone()} if module.bias else {}
        out |= {"dgain": layer.layer_norm_weight.grad.clone()} if module.norm else {}
        if module.recipe == "delayed":
            state = [layer.fp8_meta[key] for key in ("scaling_fwd", "scaling_bwd")]
            out["scales"] = [part.scale.tolist() for part in state]
            out["histories"] = [part.amax_history.t().tolist() for part in state]
        found.append({name: value.clone() if isinstance(value, Tensor) else value for name, value in out.items()})
    return found


@dataclass(frozen=True)
class Operands:
    """A cast matrix as the products read it, rowwise and columnwise, in float64."""

    row: Array
    column: Array


def both(
    module: Module, matrix: Array, target: reference.Format, weight: bool, twin: reference.Delayed | None
) -> Operands:
    """Casts one matrix as its recipe says."""
    if module.recipe == "delayed":
        assert twin is not None
        scale = twin.scale
        twin.record(reference.amax(matrix))
        made = reference.per_tensor(matrix, target, scale).values
        return Operands(made, made)
    if module.recipe == "tensorwise":
        made = reference.per_tensor(matrix, target, reference.current_scale(reference.amax(matrix), target)).values
        return Operands(made, made)
    if module.recipe == "blockwise":
        tall = 128 if weight else 1
        return Operands(
            reference.block(matrix, target, tall, 128, reference.FLOAT_MAX).values,
            reference.block(matrix, target, 128, tall, reference.FLOAT_MAX).values,
        )
    if module.recipe == "mxfp8":
        row, column = (reference.mx(matrix, target, columns=along)[0].values for along in (False, True))
        return Operands(row, column)
    return Operands(matrix, matrix)


def close(found: Tensor, wanted: Array, bf16: bool) -> None:
    """Equal but for fp32 sums, and for one rounding to bfloat16."""
    error = np.abs(found.double().numpy() - wanted).max() / np.abs(wanted).max()
    assert error < (0.005 if bf16 else 2.0e-6), error


def double(tensor: Tensor) -> Array:
    return tensor.double().numpy()


CASES = [Module(recipe, bf16=bf16) for recipe in (None, *RECIPES) for bf16 in (False, True)]
CASES += [Module(recipe, "e4m3", bias=True) for recipe in (None, *RECIPES)]
CASES += [Module("delayed", length=4, algorithm="max"), Module("delayed", length=4, algorithm="most_recent", bf16=True)]


@needs_files
@pytest.mark.parametrize("module", CASES, ids=str)
def test_the_three_products_of_a_linear(fresh_pool: WorkerPool, module: Module) -> None:
    forward, backward = FORMATS[module.format]
    twins = {
        name: reference.Delayed(target, module.length, module.algorithm)
        for name, target in (("x", forward), ("w", forward), ("dy", backward))
    }
    (steps,) = fresh_pool.run(run_module, module, world=1)
    for step, found in enumerate(steps):
        given = {name: double(values) for name, values in fixtures(module, step).items()}
        x, w = (both(module, given[name], forward, name == "w", twins[name]) for name in ("x", "w"))
        dy = both(module, given["dy"], backward, False, twins["dy"])
        # Transformer Engine rounds the bias of an FP8 product to bfloat16.
        bias = (reference.bfloat16(given["b"]) if module.recipe else given["b"]) if module.bias else 0.0
        close(found["y"], x.row @ w.row.T + bias, module.bf16)
        close(found["dx"], dy.row @ w.column, module.bf16)
        close(found["dw"], dy.column.T @ x.column, module.bf16)
        if module.bias:
            close(found["db"], given["dy"].sum(0), module.bf16)
        plain = "bf16" if module.bf16 else "fp32"
        high, low = NAMES[module.format] if module.recipe else (plain, plain)
        assert found["gemms"] == {("fprop", high, high): 1, ("dgrad", low, high): 1, ("wgrad", low, high): 1}
        if module.recipe == "delayed":
            for twin in twins.values():
                twin.update()
            order = [[twins["x"], twins["w"]], [twins["dy"]]]
            for scales, histories, kept in zip(found["scales"], found["histories"], order, strict=True):
                assert scales == [twin.scale for twin in kept] + [1.0]
                assert histories == [twin.history for twin in kept] + [[0.0] * module.length]


NORMS: dict[str, Callable[[Array, Array], Array]] = {
    "RMSNorm": lambda x, gain: gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5),
    "LayerNorm": lambda x, gain: gain * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
}


@needs_files
@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_before_the_linear(fresh_pool: WorkerPool, norm: str, recipe: str | None) -> None:
    """Without FP8 against float64 and finite differences; with it, FP8's own error and the same formats."""
    module = Module(recipe, norm=norm)
    (steps,) = fresh_pool.run(run_module, module, world=1)
    tolerance = 1.0e-5 if recipe is None else 0.15
    for step, found in enumerate(steps):
        if recipe == "delayed" and step < 2:
            continue  # it starts with scale 1, and its scales follow a step later
        given = {name: values.double() for name, values in fixtures(module, step).items()}
        x, gain, weight = (given[name].requires_grad_() for name in ("x", "gain", "w"))
        wide = (x,) if norm == "RMSNorm" else (x - x.mean(-1, keepdim=True),)
        normalised = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + 1e-5) * gain
        expected = NORMS[norm](double(x.detach()), double(gain.detach()))
        assert np.allclose(normalised.detach().numpy(), expected)
        y = normalised @ weight.t()
        y.backward(given["dy"])
        pairs = {"y": y.detach(), "dx": x.grad, "dw": weight.grad, "dgain": gain.grad}
        for name, wanted in pairs.items():
            error = (found[name].double() - wanted).norm() / wanted.norm()
            assert error < tolerance, (name, step, error.item())


def run_sharded(module: Module) -> dict[str, Any]:
    """One rank of a column- or row-parallel layer with sequence parallelism over two."""
    start()
    import transformer_engine.pytorch as te

    torch.set_num_threads(1)
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    column = module.sequence_parallel == "column"
    found: dict[str, Any] = {}
    first = fixtures(module, 0)
    layer = te.Linear(
        first["w"].shape[1],
        first["w"].shape[0],
        bias=False,
        device="cpu",
        params_dtype=first["w"].dtype,
        parallel_mode=module.sequence_parallel,
        sequence_parallel=True,
        tp_group=group,
        tp_size=2,
    )
    for step in range(2):
        given = fixtures(module, step)
        cut = {name: values.chunk(2, dim)[rank] for name, values, dim in shards(given, column)}
        with torch.no_grad():
            layer.weight.copy_(cut["w"])
        layer.zero_grad()
        x = cut["x"].clone().requires_grad_()
        with te.fp8_autocast(enabled=module.recipe is not None, fp8_recipe=recipe_of(module), fp8_group=group):
            y = layer(x)
        y.backward(cut["dy"])
        found = {"y": y.detach().clone(), "dx": x.grad.clone(), "dw": layer.weight.grad.clone()}
    return found


def shards(given: dict[str, Tensor], column: bool) -> list[tuple[str, Tensor, int]]:
    """Which dimension of x, w and dy is cut: tokens or features."""
    return [
        ("x", given["x"], 0 if column else 1),
        ("w", given["w"], 0 if column else 1),
        ("dy", given["dy"], 1 if column else 0),
    ]


@needs_files
@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("mode", ["column", "row"])
def test_sequence_parallelism_over_two_ranks(fresh_pool: WorkerPool, mode: str, recipe: str | None) -> None:
    """Gathered tensors are cast as if they had never been cut; what stays cut is cast by itself.

    Second steps: delayed scaling then uses maxima of both ranks.
    """
    module, column = Module(recipe, sequence_parallel=mode), mode == "column"
    forward, backward = FORMATS["hybrid"]
    ranks = fresh_pool.run(run_sharded, module, world=2)
    twins = {
        name: reference.Delayed(t, 1, "most_recent") for name, t in (("x", forward), ("w", forward), ("dy", backward))
    }
    for step in range(2):
        given = {name: double(values) for name, values in fixtures(module, step).items()}
        cut = {
            name: np.split(given[name], 2, dim) for name, _, dim in shards({k: torch.empty(0) for k in given}, column)
        }
        whole, kept = ("x", "dy") if column else ("dy", "x")
        target = {"x": forward, "w": forward, "dy": backward}
        gathered = both(module, given[whole], target[whole], False, twins[whole])
        weights = [both(module, part, forward, True, twins["w"]) for part in cut["w"]]
        local = [both(module, part, target[kept], False, twins[kept]) for part in cut[kept]]
        for twin in twins.values():
            twin.update()
    if column:
        close(torch.cat([r["y"] for r in ranks], 1), np.hstack([gathered.row @ w.row.T for w in weights]), False)
        dx = sum(dy.row @ w.column for dy, w in zip(local, weights, strict=True))
        dw = [dy.column.T @ gathered.column for dy in local]
        close(torch.cat([r["dx"] for r in ranks]), dx, False)
    else:
        y = sum(x.row @ w.row.T for x, w in zip(local, weights, strict=True))
        close(torch.cat([r["y"] for r in ranks]), y, False)
        close(torch.cat([r["dx"] for r in ranks], 1), np.hstack([gathered.row @ w.column for w in weights]), False)
        dw = [gathered.column.T @ x.column for x in local]
    for rank, wanted in zip(ranks, dw, strict=True):
        close(rank["dw"], wanted, False)
