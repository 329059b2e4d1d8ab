"""The loop that a user of Hugging Face models writes: sdpa attention, fused AdamW, Liger's kernels and loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.measure import Bench, free
from gpu_parts.shapes import Case
from megatron_capgap.config.schema import ModelShape


def liger_is_usable(bench: Bench) -> bool:
    """Whether Liger's kernels are installed and have a GPU."""
    if not bench.cuda:
        return False
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError:
        return False
    return True


class HuggingFaceLoop:
    """Distillation of one case at one depth, 0.5 KL divergence + 0.5 cross-entropy.

    Args:
        bench: of the part.
        case: both models' shapes.
        depth: layers of each.
        weights: the student's. fp32: under autocast to bf16, as this project's master weights are fp32; bf16: weights
            and Adam's moments in bf16, which needs less memory and rounds every update.
        liger: whether with Liger's kernels and loss. Its kernels stay in transformers' classes.
    """

    def __init__(self, bench: Bench, case: Case, depth: int, weights: torch.dtype, liger: bool) -> None:
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)
        self._case, self._device, self._autocast = case, bench.device, weights == torch.float32
        self._student = _model(bench, replace(case.student, layers=depth), case.length).to(weights)
        self._teacher = _model(bench, replace(case.teacher, layers=depth), case.length).bfloat16()
        self._teacher.eval().requires_grad_(False)
        self._loss = _liger_loss() if liger else _plain_loss
        self._optimizer = torch.optim.AdamW(
            self._student.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        make = torch.Generator(bench.device).manual_seed(5)
        shape = (case.micro_batches, case.micro_batch, case.length + 1)
        self._rows = torch.randint(case.student.vocab, shape, device=bench.device, generator=make)

    def step(self) -> None:
        """Forward and backward passes of all micro-batches, clipping and the update."""
        for rows in self._rows:
            tokens, labels = rows[:, :-1], rows[:, 1:].flatten()
            with torch.no_grad():
                of_teacher = self._teacher.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
                hidden = self._student.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            # Cast once, not once a chunk of the loss.
            head, teacher_head = self._student.lm_head.weight.bfloat16(), self._teacher.lm_head.weight
            loss = self._loss(hidden.bfloat16(), head, of_teacher, teacher_head, labels)
            (loss / len(self._rows)).backward()
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def teacher_forward(self) -> None:
        """The teacher's forward passes alone, without its head."""
        with torch.no_grad():
            for rows in self._rows:
                self._teacher.model(rows[:, :-1], use_cache=False)

    def free(self) -> None:
        """Returns the memory of both models."""
        parameters = [*self._student.parameters(), *self._teacher.parameters()]
        free(parameter.data for parameter in parameters)
        free(parameter.grad for parameter in parameters)
        free(value for state in self._optimizer.state.values() for value in state.values())


def _model(bench: Bench, shape: ModelShape, length: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=shape.tied_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(bench.device):
        return LlamaForCausalLM(config)


def _liger_loss() -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(0.5, 0.5, beta=0.0)


def _plain_loss(hidden: Tensor, head: Tensor, of_teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
    log_q = (hidden @ head.t()).float().log_softmax(1)
    with torch.no_grad():
        log_p = (of_teacher @ teacher_head.t()).float().log_softmax(1)
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return 0.5 * divergence + 0.5 * F.nll_loss(log_q, labels)
