"""Compiles the loss's kernels for GPUs that need not be there, and prints what became of them, as a JSON list.

    TRITON_INTERPRET=0 python -m tests.support.compiled_kernels 80 90 [--all]

Arguments are the compute capabilities; --all compiles every kind of kernel for each, otherwise a part that covers them.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.divergences import DIVERGENCES
from megatron_capgap.losses.kernels import chunk, passes
from megatron_capgap.losses.kernels.formulas import triton_formula

POINTERS = {"student": "*bf16", "teacher": "*bf16", "labels": "*i64"}
NUMBERS = ("start", "width", "stride", "c", "m", "ranks")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def kernels(every: bool) -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """(name, kernel, constants, warps)"""
    for name, row in DIVERGENCES.items():
        for temperature in (1.0, 2.5):
            if not every and (name, temperature) not in (("reverse_kl", 2.5), ("jsd", 1.0)):
                continue
            objective = ObjectiveConfig(divergence=name, temperature=temperature)
            weight = passes.WEIGHTS[row.shard_weight]
            formula = {"FORMULA": triton_formula(objective, torch.float32)}
            exact = {"EXACT": tl.float32}
            scale = {"TEMPERED": temperature != 1, "INVERSE": 1 / temperature, **exact}
            square = {"SQUARE": temperature**2}
            row_block = {"BLOCK": chunk.ROW_BLOCK}
            what = {"MODE": passes.DENSE, "WEIGHT": weight}
            case = f"{name} T={temperature}"
            constants = {**what, **scale, **row_block, "NOTHING": chunk.LOG_OF_NOTHING}
            yield f"statistics {case}", passes.statistics_kernel, constants, chunk.ROW_WARPS
            if not weight:
                constants = {**scale, **square, **formula, **row_block}
                yield f"sums {case}", passes.sums_kernel, constants, chunk.ROW_WARPS
            constants = {"CROSS_ENTROPY": 0.5, "DIVERGENCE": 0.5, "MODE": passes.DENSE, **scale, **formula}
            constants["BLOCK"] = chunk.GRADIENT_BLOCK
            yield f"gradient {case}", passes.gradient_kernel, constants, chunk.GRADIENT_WARPS
            constants = {**what, **square, **formula, **exact, "BLOCK": chunk.TOKEN_BLOCK}
            yield f"resolve {case}", passes.resolve_kernel, constants, 4


def compiled(kernel: Any, constants: dict[str, Any], warps: int, capability: int) -> dict[str, Any]:
    """Registers, stack bytes (spills) and global loads and stores of a kernel, by vector length and width."""
    names = kernel.arg_names
    kinds = {name: POINTERS.get(name, "i32" if name in NUMBERS else "*fp32") for name in names}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    aligned = [i for i, name in enumerate(names) if name not in {*constants, "c", "m", "ranks", "start", "width"}]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    result = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        use = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", use).groups())
    code = result.asm["ptx"]
    of_logits = re.findall(r"(ld|st)\.global[\w.:]*?(?:\.(v\d))?\.(b16|b32)", code)
    counts: dict[str, int] = {}
    for what, vector, width in of_logits:
        key = f"{what}.{vector or 'v1'}.{width}"
        counts[key] = counts.get(key, 0) + 1
    approximate = {
        name: len(re.findall(rf"{name}\.", code)) for name in ("ex2.approx", "lg2.approx", "div.full", "fma")
    }
    return {"registers": registers, "stack": stack, "accesses": counts, **approximate}


PART = ("statistics reverse_kl T=2.5", "gradient jsd T=1.0")
"""Kernels that are compiled for all capabilities in any case: those that need most registers."""

if __name__ == "__main__":
    every = "--all" in sys.argv
    capabilities = [int(word) for word in sys.argv[1:] if word != "--all"]
    rows = [
        {"kernel": name, "capability": capability, **compiled(kernel, constants, warps, capability)}
        for name, kernel, constants, warps in kernels(every)
        for capability in capabilities
        if every or name in PART or capability == capabilities[0]
    ]
    print(json.dumps(rows))
