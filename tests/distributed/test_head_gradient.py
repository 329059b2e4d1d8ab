"""The LM head's gradient in Megatron's main_grad: bf16 micro-batches against their sum in float64."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from megatron_capgap.config.schema import Layout, ModelShape, Precision
from megatron_capgap.devices import choose
from megatron_capgap.distributed import parallel_context
from megatron_capgap.losses import DistillationObjective, language_model_loss
from megatron_capgap.models import gpt
from megatron_capgap.models.sharded_state import initialise
from megatron_capgap.training import optimizer
from tests.support.pool import WorkerPool
from tests.support.reference_loss import reference_loss

SHAPE = {"family": "gpt2", "layers": 1, "hidden": 32, "heads": 4, "ffn": 64, "vocab": 101}
CROSS_ENTROPY = DistillationObjective(divergence_weight=0.0, cross_entropy_weight=1.0)


def accumulated(tied: bool, into_main_grad: bool) -> tuple[Tensor, Tensor]:
    """Runs in a worker: the head's main_grad after three micro-batches, and the sum of their exact gradients."""
    shape, device, parallel = (
        ModelShape(**SHAPE, tied_embeddings=tied),
        choose("cpu", 0),
        parallel_context.build(Layout(), 0),
    )
    chunks = gpt.build(shape, parallel, Precision(compute="bf16"), device, sequence_length=128)
    initialise(chunks, shape, parallel, 0)
    with torch.no_grad():  # what all hidden states share makes the chunks' gradients alike, and their rounding small
        gpt.unwrap(chunks[0]).decoder.final_layernorm.bias.normal_()
    (model,) = optimizer.wrap(chunks, parallel, Precision(), overlap=False)
    embedded: list[Tensor] = []  # the gradients of what the embedding gives
    gpt.unwrap(model).embedding.word_embeddings.register_forward_hook(
        lambda module, inputs, output: output.register_hook(embedded.append) and None  # the output stays as it is
    )
    head = gpt.unwrap(model).lm_head()
    expected, scale = torch.zeros_like(head, dtype=torch.float64), 1 if into_main_grad else 1 / 3
    model.zero_grad_buffer()
    for _ in range(3):
        tokens = torch.randint(shape.vocab, (2, 128))
        labels, mask = tokens.t().flatten() % 5, torch.ones(256)
        hidden = model(tokens, torch.arange(128).expand(2, -1), attention_mask=None).flatten(0, 1)
        out = language_model_loss(
            hidden, head, labels, mask,
            vocab_size=shape.vocab, group=None, chunk_tokens=8, into_main_grad=into_main_grad,
        )  # fmt: skip
        (out.loss_sum * scale).backward()
        exact = reference_loss(hidden, head, None, labels, mask, CROSS_ENTROPY, shape.vocab)
        expected += exact.head_gradient * scale
        if tied:
            expected.index_add_(0, tokens.flatten(), embedded[-1].double().flatten(0, 1))
    return head.main_grad, expected


@pytest.mark.parametrize("into_main_grad", [False, True], ids=["beside", "into"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_micro_batches_add_up_unrounded(pool: WorkerPool, tied: bool, into_main_grad: bool) -> None:
    """Rounding each to bf16 would make the error three times as large; a tied embedding has a gradient of its own."""
    ((found, expected),) = pool.run(accumulated, tied, into_main_grad, world=1)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 8e-4 * expected.norm()


def reduced_while_overlapped(tied: bool, layout: Layout) -> list[Tensor]:
    """Runs in a worker: this rank's reduced gradient buffers of two micro-batches, by the two ways of the head's
    gradient. Each is of a model of its own."""
    shape, device = ModelShape(**{**SHAPE, "layers": 2}, tied_embeddings=tied), choose("cpu", 0)
    parallel = parallel_context.build(layout, 0)
    buffers = []
    for into_main_grad in (False, True):
        chunks = gpt.build(shape, parallel, Precision(), device, sequence_length=16)
        initialise(chunks, shape, parallel, 0)
        (model,) = optimizer.wrap(chunks, parallel, Precision(), overlap=True)
        assert model.ddp_config.overlap_grad_reduce
        model.zero_grad_buffer()
        make = torch.Generator().manual_seed(parallel.dp_rank)
        for last in (False, True):
            tokens = torch.randint(shape.vocab, (2, 16), generator=make)
            with nullcontext() if last else model.no_sync():
                if not gpt.unwrap(model).pre_process:
                    model.module.set_input_tensor(torch.randn(16, 2, 32, generator=make).requires_grad_())
                hidden = model(tokens, torch.arange(16).expand(2, -1), attention_mask=None).flatten(0, 1)
                if not gpt.unwrap(model).post_process:
                    hidden.sum().backward()
                    continue
                out = language_model_loss(
                    hidden, gpt.unwrap(model).lm_head(), tokens.t().flatten(), torch.ones(32),
                    vocab_size=shape.vocab, group=None, into_main_grad=into_main_grad,
                )  # fmt: skip
                out.loss_sum.backward()
        model.finish_grad_sync()
        buffers.append(torch.cat([buffer.grad_data for buffer in model.buffers]))
    return buffers


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_buckets_are_reduced_while_the_backward_pass_runs(pool: WorkerPool, tied: bool, pipeline: int) -> None:
    """DDP's hooks see every gradient once, also the head's, which the forward pass has added."""
    for beside, into in pool.run(reduced_while_overlapped, tied, Layout(pipeline=pipeline), world=2 * pipeline):
        assert beside.any()
        torch.testing.assert_close(into, beside, rtol=1e-5, atol=1e-5)
