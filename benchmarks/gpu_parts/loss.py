"""Part loss: this project's loss, the matrix products it cannot do without, and other implementations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_parts import peers
from gpu_parts.measure import Bench
from gpu_parts.problems import (
    CHUNKS,
    OBJECTIVES,
    SIZES,
    TINY_CHUNKS,
    TINY_SIZES,
    Contender,
    Problem,
    Reference,
    Size,
)
from megatron_capgap.losses import DistillationObjective, TeacherHidden, distillation_loss

KERNELS = ("eager", "triton")


def run(bench: Bench) -> None:
    """A row for each contender and size: ms, peak_bytes, and what the marks need; then a row `gradients`."""
    for size in TINY_SIZES if bench.tiny else SIZES:
        bench.check_time()
        if bench.cuda:
            torch._dynamo.reset()  # or what it compiles for the next size is for sizes of any length, and slower
        _measure(bench, size)
        bench.collect()


def _measure(bench: Bench, size: Size) -> None:
    problem = Problem.random(bench, size)
    contenders = {contender.name: contender for contender in _contenders(bench, size)}
    chunks = TINY_CHUNKS if bench.tiny else CHUNKS
    exact = _writes_fp32(problem)
    bare = {f"matrix products, {chunk}": _matrix_products(problem, chunk, exact) for chunk in chunks}
    steps: dict[str, Callable[[], object]] = {c.name: lambda c=c: c.run(problem) for c in contenders.values()}

    def values(name: str, seconds: float, peak: int | None) -> dict[str, Any]:
        if name in bare:
            head_gradient = "fp32" if exact else "bf16"
            return {
                "kind": "bare",
                "chunk": int(name.split(", ")[1]),
                "flops": size.flops,
                "head_gradient": head_gradient,
            }
        c = contenders[name]
        if c.ours and peak is not None:
            peak += problem.main_grad.nbytes  # which was allocated before; a peer's head gradient is allocated within
        facts = {"kind": "ours" if c.ours else "peer", "objective": c.objective, "exact": c.exact, "chunk": c.chunk}
        return {**facts, "kernels": c.kernels, "flops": size.flops, "peak_bytes": peak}

    timed = bench.in_turn("loss", size.case, {**bare, **steps}, values)
    bench.collect()
    if (reference := bench.attempt("gradients", size.case, "float64", lambda: Reference(problem))) is None:
        return
    for name in timed.keys() & contenders.keys():
        error = bench.attempt("gradients", size.case, name, lambda c=contenders[name]: reference.error(problem, c))
        if error is not None:
            bench.report.add("gradients", size.case, name, relative_error=error)


def _contenders(bench: Bench, size: Size) -> list[Contender]:
    chunks = TINY_CHUNKS if bench.tiny else CHUNKS
    found = []
    for kernels in KERNELS:
        if reason := unavailable(bench, kernels):
            bench.report.add("loss", size.case, f"ours, {kernels}", absent=f"not available: {reason}")
        else:
            found += [ours(kernels, chunk) for chunk in chunks]
    if not size.every:
        families = {"Liger chunked": peers.FAMILIES["Liger chunked"]}
    else:
        default = "eager" if unavailable(bench, "triton") else "triton"
        found += [ours(default, chunks[1], objective) for objective in ("kl", "ce")]
        families = peers.FAMILIES
    for name, build in families.items():
        found += bench.attempt("loss", size.case, name, lambda build=build: build(bench)) or []
    if size is not (TINY_SIZES if bench.tiny else SIZES)[0]:  # compiling takes long
        found = [contender for contender in found if not contender.first_only]
    return found


def unavailable(bench: Bench, kernels: str) -> str | None:
    """Why the loss cannot be measured with these kernels; None if it can."""
    if kernels == "eager":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if bench.cuda else "on a CPU Triton has only its interpreter"


def ours(kernels: str, chunk: int, objective: str = "kl+ce") -> Contender:
    """The loss of this project."""
    divergence, cross_entropy = OBJECTIVES[objective]
    settings = DistillationObjective(divergence_weight=divergence, cross_entropy_weight=cross_entropy)

    def loss(p: Problem) -> Tensor:
        return distillation_loss(
            p.hidden,
            p.head,
            TeacherHidden(p.teacher_hidden, p.teacher_head),
            p.labels,
            p.mask,
            objective=settings,
            vocab_size=p.size.vocab,
            group=None,
            chunk_tokens=chunk,
            kernels=kernels,
            into_main_grad=True,
        ).loss_sum

    what = "" if objective == "kl+ce" else f", {objective} only"
    name = f"ours, {kernels}, {chunk}{what}"
    return Contender(name, loss, objective, ours=True, chunk=chunk, kernels=kernels)


def _add_to_main_grad(problem: Problem, logits: Tensor, rows: Tensor) -> None:
    """main_grad [v, h] += logits [c, v]^T @ rows [c, h], within the product."""
    torch.addmm(problem.main_grad, logits.t(), rows, out_dtype=torch.float32, out=problem.main_grad)


def _writes_fp32(problem: Problem) -> bool:
    """Whether torch's product of bf16 can add to fp32: from torch 2.8 on, on a GPU."""
    head = problem.head.detach()
    try:
        _add_to_main_grad(problem, head.new_zeros(16, head.shape[0]), problem.hidden.detach()[:16])
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def _matrix_products(problem: Problem, chunk: int, exact: bool) -> Callable[[], None]:
    """The four products that every loss over two heads needs, in the same shapes; the head's gradient in fp32 if
    `exact`."""
    hidden, head = problem.hidden.detach(), problem.head.detach()
    student, teacher = (head.new_zeros(chunk, head.shape[0]) for _ in range(2))
    hidden_gradient = torch.empty_like(hidden)
    narrow = None if exact else torch.zeros_like(head)

    def run() -> None:
        for first in range(0, hidden.shape[0], chunk):
            rows = slice(first, first + chunk)
            part = hidden[rows]
            logits = torch.mm(part, head.t(), out=student[: len(part)])
            torch.mm(problem.teacher_hidden[rows], problem.teacher_head.t(), out=teacher[: len(part)])
            torch.mm(logits, head, out=hidden_gradient[rows])
            if narrow is None:
                _add_to_main_grad(problem, logits, part)
            else:
                narrow.addmm_(logits.t(), part)

    return run
