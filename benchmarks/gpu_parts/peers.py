"""Other implementations of the loss. Each function raises ImportError where its library is not installed."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts import product
from gpu_parts.measure import Bench
from gpu_parts.problems import Contender, Problem


def dense(bench: Bench) -> list[Contender]:
    """Whole logits in fp32, torch's own functions; also compiled on a GPU."""

    def loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
        log_q = (hidden @ head.t()).float().log_softmax(1)
        log_p = (teacher_hidden @ teacher_head.t()).float().log_softmax(1)
        divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return 0.5 * divergence + 0.5 * F.nll_loss(log_q, labels, reduction="sum")

    def contender(name: str, function: Callable[..., Tensor], **options: bool) -> Contender:
        def of(p: Problem) -> Tensor:
            return function(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)

        return Contender(name, of, **options)

    compiled = []
    if bench.cuda:
        compiled = [contender("torch, whole logits, compiled", torch.compile(loss), first_only=True)]
    return [contender("torch, whole logits", loss), *compiled]


def liger_chunked(bench: Bench) -> list[Contender]:
    """Liger's chunked distillation loss; beta 0 is the forward KL divergence."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def contender(compiled: bool, chunk: int, first_only: bool = False) -> Contender:
        module = LigerFusedLinearJSDLoss(0.5, 0.5, beta=0.0, compiled=compiled, chunk_size=chunk)
        name = f"Liger chunked, {chunk}{', compiled' if compiled else ''}"
        return Contender(name, _of(module), is_mean=True, first_only=first_only)

    if bench.tiny:
        return [contender(bench.cuda, 32)]
    return [contender(True, 1024), contender(True, 4096, first_only=True), contender(False, 1024, first_only=True)]


def liger_fused(bench: Bench) -> list[Contender]:
    """Liger's Triton losses: divergence without cross-entropy, and cross-entropy alone."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    if not bench.cuda:
        raise ImportError("liger-kernel's Triton kernels need a GPU")
    divergence, cross_entropy = LigerFusedLinearJSD(jsd_beta=0.0), LigerFusedLinearCrossEntropyLoss()
    wide = LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=torch.float32)

    return [
        Contender("Liger fused_linear_jsd", _of(divergence), "kl", is_mean=True),
        Contender("Liger fused_linear_jsd, fp32 sums", _of(wide), "kl", is_mean=True),
        Contender(
            "Liger fused_linear_cross_entropy", lambda p: cross_entropy(p.head, p.hidden, p.labels), "ce", is_mean=True
        ),
    ]


def _of(module: torch.nn.Module) -> Callable[[Problem], Tensor]:
    """A module with Liger's arguments, of a problem."""
    return lambda p: module(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)


def modelopt(bench: Bench) -> list[Contender]:
    """modelopt's LogitsKLLoss with Megatron's cross-entropy, on whole logits."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    product.one_rank(bench)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    kl = LogitsKLLoss(types.SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False))

    def loss(p: Problem) -> Tensor:
        student = (p.hidden @ p.head.t())[:, None]  # [s, b = 1, v]
        with torch.no_grad():
            teacher = (p.teacher_hidden @ p.teacher_head.t())[:, None]
        divergence = kl(student, teacher)[0].sum()
        # After the divergence: in fp32 Megatron's cross-entropy overwrites its logits.
        return 0.5 * divergence + 0.5 * vocab_parallel_cross_entropy(student, p.labels[:, None]).sum()

    return [Contender("modelopt KL + Megatron CE", loss)]


def cut_cross_entropy(bench: Bench) -> list[Contender]:
    """Apple's cut-cross-entropy: no teacher. By default it leaves small gradients out."""
    from cut_cross_entropy import linear_cross_entropy

    def contender(name: str, exact: bool) -> Contender:
        options = {"impl": "cce" if bench.cuda else "torch_compile", **({"filter_eps": None} if exact else {})}

        def loss(p: Problem) -> Tensor:
            return linear_cross_entropy(p.hidden, p.head, p.labels, reduction="sum", **options)

        return Contender(name, loss, "ce", exact=exact)

    return [contender("cut-cross-entropy", False), contender("cut-cross-entropy, exact", True)]


FAMILIES = {
    "Liger chunked": liger_chunked,
    "Liger fused": liger_fused,
    "modelopt": modelopt,
    "cut-cross-entropy": cut_cross_entropy,
    "torch": dense,
}
