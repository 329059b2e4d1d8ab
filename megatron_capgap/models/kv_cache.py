"""Incremental forward passes with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models.gpt import HiddenStateModel, unwrap

_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


class CachedForward:
    """A model with the key/value cache of one batch of sequences, which all grow by the same number of tokens.

    The cache is Megatron-Core's own: keys and values `[length, b, kv_heads/tp, d]` of each layer on this rank.

    Args:
        chunks: this rank's model chunks, in evaluation mode and inside `whole_sequences`.
        parallel: their layout.
        rows: b, the number of sequences in the batch.
        length: maximum number of tokens of a sequence.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, rows: int, length: int) -> None:
        self._models = [unwrap(chunk) for chunk in chunks]
        self._parallel = parallel
        self._context = StaticInferenceContext(rows, length)

    def step(self, tokens: Tensor) -> Tensor | None:
        """Runs the next tokens of every sequence. Collective over the tensor- and pipeline-parallel ranks.

        One send and receive between neighbouring stages, one all-gather over tensor-parallel ranks on the last stage.

        Args:
            tokens: int64 `[b, s]`, replicated; s is 1 after the first call.

        Returns:
            On the last stage the logits `[b, v]` after the last token, v the padded vocabulary, replicated over
            tensor-parallel ranks; None on other stages.
        """
        assert tokens.shape[1] == 1 or self._context.sequence_len_offset == 0, "a causal mask starts at position 0"
        start = self._context.sequence_len_offset
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = None
        for model in self._models:
            if not model.pre_process:
                model.set_input_tensor([self._receive(model, tokens)])
            hidden = model(tokens, positions, attention_mask=None, inference_context=self._context)
            if not model.post_process:
                dist.send(hidden.contiguous(), self._neighbour(1), group=self._parallel.groups.pp)
        self._context.increment_sequence_len_offset(tokens.shape[1])
        if not self._parallel.is_last_stage:
            return None
        assert hidden is not None, "every rank has a chunk"
        return self._logits(hidden[-1])

    def _receive(self, model: HiddenStateModel, tokens: Tensor) -> Tensor:
        """Receives the previous stage's hidden states `[s, b, h]`; blocking, because there is no work to overlap."""
        rows, length = tokens.shape
        hidden = tokens.new_empty(length, rows, model.config.hidden_size, dtype=model.config.pipeline_dtype)
        dist.recv(hidden, self._neighbour(-1), group=self._parallel.groups.pp)
        return hidden

    def _neighbour(self, step: int) -> int:
        """Global rank of a neighbouring stage; with virtual stages the first follows the last."""
        stage = (self._parallel.pp_rank + step) % self._parallel.layout.pipeline
        return dist.get_global_rank(self._parallel.groups.pp, stage)

    def _logits(self, hidden: Tensor) -> Tensor:
        """`[b, h]` to `[b, v]`. Collective: one all-gather over tensor-parallel ranks."""
        shard = hidden @ self._models[-1].lm_head().t()
        shards = [torch.empty_like(shard) for _ in range(self._parallel.layout.tensor)]
        dist.all_gather(shards, shard.contiguous(), group=self._parallel.groups.tp)
        return torch.cat(shards, dim=-1)


@contextmanager
def whole_sequences(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Disables sequence parallelism within the context: a single token cannot be sharded over tensor-parallel ranks.

    The switch changes which collectives run, not the weights. Megatron's own switch identifies models by their address,
    which another model may have reused.
    """
    owners = [owner for chunk in chunks for part in chunk.modules() for owner in (part, getattr(part, "config", None))]
    before = [(owner, name, vars(owner)[name]) for owner in owners for name in _SEQUENCE_PARALLEL if _has(owner, name)]
    try:
        for owner, name, _ in before:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _has(owner: object, name: str) -> bool:
    return owner is not None and isinstance(vars(owner).get(name), bool)
