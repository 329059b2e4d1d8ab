"""Conversations that share rows have the losses and gradients of the same ones in rows of their own."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_capgap.config.schema import Layout, ModelShape
from tests.support.pool import WorkerPool

SHAPES = {
    "llama": ModelShape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=61),
    "gpt2": ModelShape(layers=2, hidden=32, heads=4, ffn=48, vocab=61, family="gpt2", max_positions=24),
}
LAYOUTS = {
    "one": (1, Layout()),
    "tp2_sp": (2, Layout(tensor=2, sequence=True)),
    "pp2": (2, Layout(pipeline=2)),
    "tp2_pp2": (4, Layout(tensor=2, pipeline=2)),
}


def losses(shape: ModelShape, cut: Layout) -> list[tuple[float, float, float]]:
    """Runs in a worker: (loss sum, tokens, gradient norm of this rank) of the conversations packed, and in own rows."""
    from megatron_capgap.config.schema import Precision
    from megatron_capgap.data.conversation_packing import Example, PackedConversationDataset, collate
    from megatron_capgap.devices import choose
    from megatron_capgap.distributed import parallel_context
    from megatron_capgap.losses import language_model_loss
    from megatron_capgap.models import gpt, pipeline_schedule
    from megatron_capgap.models.sharded_state import initialise

    device = choose("cpu", 0)
    parallel = parallel_context.build(cut, 0)
    chunks = gpt.build(shape, parallel, Precision(), device, sequence_length=24)
    initialise(chunks, shape, parallel, 0)
    draw = np.random.default_rng(2)
    examples = [
        Example(draw.integers(shape.vocab, size=n + 1), draw.random(n) < 0.6) for n in (9, 11, 3, 24, 7, 5, 2, 8)
    ]
    found: list[Any] = []
    for packed in (True, False):
        sequence = PackedConversationDataset(examples, 24, None, packed=packed)
        batches = [collate([sequence.conversations(k)], [k], 24, device.torch_device) for k in range(len(sequence))]
        assert len(batches) == (3 if packed else 8)
        total = torch.zeros(2, dtype=torch.float64)

        def last_stage(hidden: torch.Tensor, batch: Any, total: torch.Tensor = total) -> Any:
            out = language_model_loss(
                hidden.flatten(0, 1), gpt.unwrap(chunks[-1]).lm_head(), *batch.flat(), vocab_size=shape.vocab,
                group=parallel.groups.tp, sequence_parallel=cut.sequence,
            )  # fmt: skip
            total += torch.stack([out.loss_sum.detach(), out.num_tokens]).double()
            return out.loss_sum, out.num_tokens.int(), None

        for chunk in chunks:
            chunk.zero_grad(set_to_none=True)
        pipeline_schedule.run(chunks, parallel, batches, last_stage, forward_only=False, shape=(24, 1))
        gradients = [p for chunk in chunks for p in chunk.parameters() if p.grad is not None]
        for parameter in gradients:
            if getattr(parameter, "sequence_parallel", False):  # each rank has seen a part of the tokens
                torch.distributed.all_reduce(parameter.grad, group=parallel.groups.tp)
        norm = sum(parameter.grad.double().square().sum() for parameter in gradients) ** 0.5
        found.append((*total.tolist(), float(norm)))
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_changes_nothing(pool: WorkerPool, name: str, layout: str) -> None:
    world, cut = LAYOUTS[layout]
    for packed, alone in pool.run(losses, SHAPES[name], cut, world=world):
        assert packed == pytest.approx(alone, rel=1e-5)
        assert packed[2] > 0
    assert packed[1] > 20, "the last rank counts the tokens"
