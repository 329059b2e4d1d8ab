"""Importance scores of heads, neurons, channels and layers, from hooks on a frozen model during its pipeline schedule.

Scores are derivatives of the loss with respect to masks of ones: one on each head's output, one on each neuron, and one
for all layers on the channels (of the embeddings, of the outputs of attention and feed-forward, and of the residual
sums). At 1 such a derivative is the sum over tokens of value times gradient, so the masks are never created: hooks read
both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.models import pipeline_schedule
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.pruning.importance_scores import Scores

_BLOCK = 1 << 17
"""Numbers held in float64 at a time (1 MiB)."""
MeanLoss = Callable[[Tensor, Tensor, Any], Tensor]
"""(final hidden states `[s/tp or s, b, h]`, LM head shard `[v/tp, h]`, micro-batch) -> its mean loss, a scalar."""


class Importance:
    """Accumulates a model's scores over global batches.

    Each number is counted on exactly one rank of a model replica, so one sum over all ranks completes the scores.

    Args:
        chunks: the model on this rank, one chunk, without dropout; it is frozen.
        parallel: its layout.
        shape: the model's sizes.
        gradient: True scores by |d loss / d mask|, a mean over micro-batches; False by activations, forward only.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, shape: ModelShape, *, gradient: bool
    ) -> None:
        self._chunks, self._parallel, self._shape, self._gradient = chunks, parallel, shape, gradient
        self._device = next(chunks[0].parameters()).device
        self._sums = Scores.zeros(shape, self._device)
        # Under sequence parallelism each rank holds a shard of the tokens; otherwise the residual stream is replicated.
        self._sees_its_own = parallel.layout.sequence or parallel.tp_rank == 0
        self._seen: Counter[str] = Counter()
        # Derivatives by the masks, for each micro-batch of the current global batch: `[m, h]` and `[m, layers]`.
        self._by_channel = self._by_layer = torch.empty(0)
        for chunk in chunks:
            chunk.train(gradient)  # whole layers are recomputed in training mode only; without dropout it is the same
            chunk.requires_grad_(False)
            self._watch(unwrap(chunk))

    def run(self, batches: Sequence[Any], loss: MeanLoss) -> None:
        """Adds one global batch. Collective.

        Args:
            batches: this data-parallel rank's micro-batches.
            loss: the loss that is differentiated; not called when activations are scored.
        """
        self._seen.clear()
        count = len(batches)
        self._by_channel = torch.zeros(count, self._shape.hidden, dtype=torch.float64, device=self._device)
        self._by_layer = torch.zeros(count, self._shape.layers, dtype=torch.float64, device=self._device)

        def last_stage(hidden: Tensor, batch: Any) -> tuple[Tensor, Tensor, None]:
            lm_head = unwrap(self._chunks[-1]).lm_head()
            value = loss(hidden, lm_head, batch) if self._gradient else hidden.new_zeros(())
            return value, torch.zeros((), dtype=torch.int, device=hidden.device), None

        micro_batch, length = batches[0].tokens.shape
        with torch.set_grad_enabled(self._gradient):
            pipeline_schedule.run(
                self._chunks, self._parallel, batches, last_stage, forward_only=not self._gradient,
                shape=(length, micro_batch),
            )  # fmt: skip
        if self._gradient:
            self._take_absolutes()

    def scores(self) -> Scores:
        """The sums over all ranks and all batches so far, on the CPU. Collective.

        Raises:
            UserError: a score is not finite.
        """
        total = self._sums.vector()
        dist.all_reduce(total)
        if not torch.isfinite(total).all():
            raise UserError(
                "the scores are not finite, because the teacher's loss or activations are not; evaluate "
                "teacher.checkpoint on data.train, or use another checkpoint"
            )
        return Scores.from_vector(total.cpu(), self._shape)

    def _take_absolutes(self) -> None:
        """Adds |derivative| of each micro-batch for masks whose terms are on several ranks. Collective."""
        terms, groups = torch.cat([self._by_channel, self._by_layer], dim=1), self._parallel.groups
        if self._parallel.layout.sequence:
            dist.all_reduce(terms, group=groups.tp)
        if self._parallel.layout.pipeline > 1:
            dist.all_reduce(terms, group=groups.pp)
        if self._parallel.is_last_stage and self._parallel.tp_rank == 0:
            channels, layers = terms.abs().sum(0).split([self._shape.hidden, self._shape.layers])
            self._sums.channels.add_(channels)
            self._sums.layers.add_(layers)

    def _once(self, hook: Callable[..., None]) -> Callable[..., None]:
        """The hook, called once per micro-batch: a recomputed layer runs forward without gradients before."""
        return lambda *inputs: None if self._gradient and not torch.is_grad_enabled() else hook(*inputs)

    def _watch(self, model: Any) -> None:
        """Registers hooks on all scored parts of one chunk."""
        if self._gradient and model.pre_process:
            model.embedding.register_forward_hook(self._embedded)
        for layer in model.decoder.layers:
            index = layer.layer_number - 1
            attention, mlp = layer.self_attention, layer.mlp
            attention.linear_proj.register_forward_pre_hook(
                self._once(partial(self._heads, index, _reading(attention.linear_proj)))
            )
            mlp.linear_fc2.register_forward_pre_hook(
                self._once(partial(self._neurons, index, _reading(mlp.linear_fc2)))
            )
            self._watch_norm(2 * index, layer.input_layernorm, attention.linear_qkv)
            self._watch_norm(2 * index + 1, layer.pre_mlp_layernorm, mlp.linear_fc1)
            if self._gradient:
                attention.register_forward_hook(self._once(partial(self._branch, index)))
                mlp.register_forward_hook(self._once(partial(self._branch, index)))
                if not ARCHITECTURES[self._shape.family].parallel_residual:
                    layer.pre_mlp_layernorm.register_forward_pre_hook(self._once(partial(self._middle, index)))
            layer.register_forward_hook(self._once(partial(self._layer, index)), with_kwargs=True)
        if model.post_process:
            self._watch_norm(2 * self._shape.layers, model.decoder.final_layernorm, None)

    def _watch_norm(self, index: int, norm: Any, fused: Any) -> None:
        """Hooks a norm. Transformer Engine's norms are part of the following linear, an identity is in their place."""
        gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if gain is None:
            gain, bias = fused.layer_norm_weight, getattr(fused, "layer_norm_bias", None)
        norm.register_forward_pre_hook(self._once(partial(self._norm, index, gain, bias)))

    def _heads(self, index: int, reading: Tensor, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """Attention's output, `[s, b, heads/tp * d]`: this rank's heads of all tokens."""
        tensor, rank = self._parallel.layout.tensor, self._parallel.tp_rank
        heads, kv_heads = self._shape.heads // tensor, derived.kv_heads(self._shape) // tensor

        def add(columns: Tensor) -> None:
            by_head = columns.view(heads, -1).sum(-1)
            by_group = by_head.view(kv_heads, -1).sum(-1)
            self._sums.heads[index, rank * heads : (rank + 1) * heads] += by_head.abs()
            self._sums.groups[index, rank * kv_heads : (rank + 1) * kv_heads] += by_group.abs()

        self._columns(inputs[0], reading, add)

    def _neurons(self, index: int, reading: Tensor, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """The activation's output, `[s, b, ffn/tp]`: this rank's neurons of all tokens."""
        neurons, rank = inputs[0].shape[-1], self._parallel.tp_rank

        def add(columns: Tensor) -> None:
            self._sums.neurons[index, rank * neurons : (rank + 1) * neurons] += columns.abs()

        self._columns(inputs[0], reading, add)

    def _columns(self, value: Tensor, reading: Tensor, add: Callable[[Tensor], None]) -> None:
        """Adds one number per column: now, from its size and the weights that read it, or in the backward pass."""
        if self._gradient:
            _when_known(value, value, add)
        else:
            add(_over_tokens(value.abs()) * reading)

    def _embedded(self, module: Any, _: Any, output: Tensor) -> None:
        """Makes the embedding's output require a gradient: all weights are frozen, so the graph starts here."""
        self._masked(output.requires_grad_(), output, self._call("embedding"))

    def _branch(self, index: int, module: Any, _: Any, output: tuple[Tensor, Tensor | None]) -> None:
        """The output of attention or feed-forward before the residual addition; its bias is returned separately."""
        value, bias = output
        added = value.detach() if bias is None else value.detach() + bias
        self._masked(value, added, self._call(f"{index} {type(module).__name__}"), index)

    def _middle(self, index: int, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """The residual stream between attention and feed-forward."""
        self._masked(inputs[0], inputs[0], self._call(f"{index} middle"))

    def _layer(self, index: int, _: Any, inputs: tuple[Tensor, ...], named: Any, output: tuple[Tensor, Any]) -> None:
        """A whole layer: the residual stream after it, or the cosine distance between its input and output."""
        if self._gradient:
            self._masked(output[0], output[0], self._call(f"{index} layer"))
        elif self._sees_its_own:
            given = inputs[0] if inputs else named["hidden_states"]
            turned = 1 - torch.cosine_similarity(given.float(), output[0].float(), dim=-1)
            self._sums.layers[index] += turned.sum(dtype=torch.float64)

    def _masked(self, tensor: Tensor, value: Tensor, call: int, index: int | None = None) -> None:
        """Scores one position of the channels' mask, and with an index also the mask of a layer.

        Args:
            tensor: the tensor whose gradient equals the value's.
            value: `[s, b, h]`, or `[s/tp, b, h]` under sequence parallelism.
            call: number of the micro-batch.
            index: of the layer.
        """

        def add(terms: Tensor) -> None:
            self._by_channel[call] += terms
            if index is not None:
                self._by_layer[call, index] += terms.sum()

        _when_known(tensor, value, add)

    def _call(self, place: str) -> int:
        """Number of the current micro-batch: every schedule runs a chunk over them in order."""
        self._seen[place] += 1
        return self._seen[place] - 1

    @torch.no_grad()
    def _norm(self, index: int, gain: Tensor, bias: Tensor | None, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """A norm's input, the residual stream `[s, b, h]`, or `[s/tp, b, h]` under sequence parallelism."""
        if not self._sees_its_own:
            return
        wide = inputs[0].float()
        if ARCHITECTURES[self._shape.family].norm == "LayerNorm":
            wide = wide - wide.mean(-1, keepdim=True)
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._shape.norm_epsilon)
        self._sums.squares[index] += _over_tokens(normal, normal)
        if not self._gradient:
            behind = normal * gain if bias is None else normal * gain + bias
            self._sums.channels.add_(_over_tokens(behind.abs()))


def _reading(linear: Any) -> Tensor:
    """L2 norm of the weights that read each of this rank's columns, float64 `[in/tp]`."""
    return linear.weight.detach().double().norm(dim=0)


def _when_known(tensor: Tensor, value: Tensor, add: Callable[[Tensor], None]) -> None:
    """Sums value times gradient over tokens once the backward pass computes the gradient.

    Args:
        tensor: the tensor whose gradient equals the value's.
        value: `[s, b, n]`.
        add: called with the sums, float64 `[n]`.
    """
    # An alias, because the pipeline frees the memory of a sent output through the tensor itself. Dropped after use,
    # because the graph lives until the next micro-batch has run forward.
    waiting = [value.detach()]
    tensor.register_hook(lambda gradient: add(_over_tokens(waiting.pop(), gradient)))


def _over_tokens(*factors: Tensor) -> Tensor:
    """The product of tensors `[s, b, n]`, summed over tokens in float64: `[n]`.

    Processes a few tokens at a time, because torch would first make a float64 copy of all of them.
    """
    batch, columns = factors[0].shape[1:]
    total = factors[0].new_zeros(columns, dtype=torch.float64)
    for parts in zip(*(factor.split(max(1, _BLOCK // (batch * columns))) for factor in factors), strict=True):
        product = parts[0].double()
        for part in parts[1:]:
            product = product * part
        total += product.sum((0, 1))
    return total
