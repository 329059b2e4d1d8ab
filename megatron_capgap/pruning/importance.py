"""What heads, neurons, channels and layers are worth, read off a frozen model while it runs under its schedule.

A mask of ones stands, in thought, on each head's output, on each neuron, and one for all layers on the channels: of
the embeddings, of what attention and feed-forward add to the residual stream, and of the sums. At 1 the derivative by a
mask is the sum over tokens of value times gradient, so no mask is ever made: hooks see both.
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
from megatron_capgap.models import schedule
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.pruning.importance_scores import Scores

_BLOCK = 1 << 17
"""Numbers that are in float64 at a time: 1 MiB of them."""
MeanLoss = Callable[[Tensor, Tensor, Any], Tensor]
"""(final hidden states `[s/tp or s, b, h]`, LM head shard `[v/tp, h]`, micro-batch) to its mean loss, a scalar."""


class Importance:
    """Scores of a model, adding up from one global batch to the next.

    Every number is counted on one rank of a model's copy, so that one sum over the world makes the scores whole.

    Args:
        chunks: the model on this rank, one chunk, without dropout; it is frozen.
        parallel: its layout.
        shape: the model in numbers.
        gradient: score by |d loss / d mask|, a mean over micro-batches; else by activations, forward only.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, shape: ModelShape, *, gradient: bool
    ) -> None:
        self._chunks, self._parallel, self._shape, self._gradient = chunks, parallel, shape, gradient
        self._device = next(chunks[0].parameters()).device
        self._sums = Scores.zeros(shape, self._device)
        # Under sequence parallelism each rank sees a part of the tokens, else all see the same residual stream.
        self._sees_its_own = parallel.layout.sequence or parallel.tp_rank == 0
        self._seen: Counter[str] = Counter()
        # Derivatives by the masks of each micro-batch of the global batch at work: `[m, h]` and `[m, layers]`.
        self._by_channel = self._by_layer = torch.empty(0)
        for chunk in chunks:
            chunk.eval()
            chunk.requires_grad_(False)
            self._watch(unwrap(chunk))

    def run(self, batches: Sequence[Any], loss: MeanLoss) -> None:
        """Adds one global batch. Collective.

        Args:
            batches: this data-parallel rank's micro-batches.
            loss: what masks are differentiated through; not called where activations are scored.
        """
        self._seen.clear()
        count = len(batches)
        self._by_channel = torch.zeros(count, self._shape.hidden, dtype=torch.float64, device=self._device)
        self._by_layer = torch.zeros(count, self._shape.layers, dtype=torch.float64, device=self._device)

        def last_stage(hidden: Tensor, batch: Any) -> tuple[Tensor, Tensor, None]:
            head = unwrap(self._chunks[-1]).lm_head()
            value = loss(hidden, head, batch) if self._gradient else hidden.new_zeros(())
            return value, torch.zeros((), dtype=torch.int, device=hidden.device), None

        micro_batch, length = batches[0].tokens.shape
        with torch.set_grad_enabled(self._gradient):
            schedule.run(
                self._chunks, self._parallel, batches, last_stage, forward_only=not self._gradient,
                shape=(length, micro_batch),
            )  # fmt: skip
        if self._gradient:
            self._take_absolutes()

    def scores(self) -> Scores:
        """The sums over all ranks and all batches so far, on the CPU. Collective.

        Raises:
            UserError: one of them is not finite.
        """
        total = self._sums.vector()
        dist.all_reduce(total)
        if not torch.isfinite(total).all():
            raise UserError(
                "the scores are not finite: the teacher's loss or its activations are not; evaluate teacher.checkpoint "
                "on data.train, or use another one"
            )
        return Scores.from_vector(total.cpu(), self._shape)

    def _take_absolutes(self) -> None:
        """|derivative| of each micro-batch by masks whose terms lie on several ranks."""
        terms, groups = torch.cat([self._by_channel, self._by_layer], dim=1), self._parallel.groups
        if self._parallel.layout.sequence:
            dist.all_reduce(terms, group=groups.tp)
        if self._parallel.layout.pipeline > 1:
            dist.all_reduce(terms, group=groups.pp)
        if self._parallel.is_last_stage and self._parallel.tp_rank == 0:
            channels, layers = terms.abs().sum(0).split([self._shape.hidden, self._shape.layers])
            self._sums.channels.add_(channels)
            self._sums.layers.add_(layers)

    def _watch(self, model: Any) -> None:
        """Hooks on everything that is scored in one chunk."""
        if self._gradient and model.pre_process:
            model.embedding.register_forward_hook(self._embedded)
        for layer in model.decoder.layers:
            index = layer.layer_number - 1
            attention, mlp = layer.self_attention, layer.mlp
            attention.linear_proj.register_forward_pre_hook(
                partial(self._heads, index, _reading(attention.linear_proj))
            )
            mlp.linear_fc2.register_forward_pre_hook(partial(self._neurons, index, _reading(mlp.linear_fc2)))
            self._watch_norm(2 * index, layer.input_layernorm, attention.linear_qkv)
            self._watch_norm(2 * index + 1, layer.pre_mlp_layernorm, mlp.linear_fc1)
            if self._gradient:
                attention.register_forward_hook(partial(self._branch, index))
                mlp.register_forward_hook(partial(self._branch, index))
                if not ARCHITECTURES[self._shape.family].parallel_residual:
                    layer.pre_mlp_layernorm.register_forward_pre_hook(partial(self._middle, index))
            layer.register_forward_hook(partial(self._layer, index), with_kwargs=True)
        if model.post_process:
            self._watch_norm(2 * self._shape.layers, model.decoder.final_layernorm, None)

    def _watch_norm(self, index: int, norm: Any, fused: Any) -> None:
        """Transformer Engine's norms live in the linear behind them; an identity stands in their place."""
        gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if gain is None:
            gain, bias = fused.layer_norm_weight, getattr(fused, "layer_norm_bias", None)
        norm.register_forward_pre_hook(partial(self._norm, index, gain, bias))

    def _heads(self, index: int, reading: Tensor, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """Attention's output, `[s, b, heads/tp * d]`: this rank's heads of all tokens."""
        tensor, rank = self._parallel.layout.tensor, self._parallel.tp_rank
        heads, groups = self._shape.heads // tensor, derived.kv_heads(self._shape) // tensor

        def add(columns: Tensor) -> None:
            by_head = columns.view(heads, -1).sum(-1)
            by_group = by_head.view(groups, -1).sum(-1)
            self._sums.heads[index, rank * heads : (rank + 1) * heads] += by_head.abs()
            self._sums.groups[index, rank * groups : (rank + 1) * groups] += by_group.abs()

        self._columns(inputs[0], reading, add)

    def _neurons(self, index: int, reading: Tensor, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """What the activation leaves, `[s, b, ffn/tp]`: this rank's neurons of all tokens."""
        neurons, rank = inputs[0].shape[-1], self._parallel.tp_rank

        def add(columns: Tensor) -> None:
            self._sums.neurons[index, rank * neurons : (rank + 1) * neurons] += columns.abs()

        self._columns(inputs[0], reading, add)

    def _columns(self, value: Tensor, reading: Tensor, add: Callable[[Tensor], None]) -> None:
        """One number a column: now, of its size and of the weights that read it, or when its gradient is known."""
        if self._gradient:
            _when_known(value, value, add)
        else:
            add(_over_tokens(value.abs()) * reading)

    def _embedded(self, module: Any, _: Any, output: Tensor) -> None:
        """The embedding is where gradients begin: no weight wants any."""
        self._masked(output.requires_grad_(), output, self._call("embedding"))

    def _branch(self, index: int, module: Any, _: Any, output: tuple[Tensor, Tensor | None]) -> None:
        """What attention or feed-forward adds to the residual stream; its bias comes apart from it."""
        value, bias = output
        added = value.detach() if bias is None else value.detach() + bias
        self._masked(value, added, self._call(f"{index} {type(module).__name__}"), index)

    def _middle(self, index: int, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """The sum between attention and feed-forward."""
        self._masked(inputs[0], inputs[0], self._call(f"{index} middle"))

    def _layer(self, index: int, _: Any, inputs: tuple[Tensor, ...], named: Any, output: tuple[Tensor, Any]) -> None:
        """A whole layer: the sum that it leaves, or how far it turns what it was given."""
        if self._gradient:
            self._masked(output[0], output[0], self._call(f"{index} layer"))
        elif self._sees_its_own:
            given = inputs[0] if inputs else named["hidden_states"]
            turned = 1 - torch.cosine_similarity(given.float(), output[0].float(), dim=-1)
            self._sums.layers[index] += turned.sum(dtype=torch.float64)

    def _masked(self, tensor: Tensor, value: Tensor, call: int, index: int | None = None) -> None:
        """A place where the channels' mask stands, and with an index the mask of a layer.

        Args:
            tensor: whose gradient is the value's.
            value: `[s, b, h]`, or `[s/tp, b, h]`.
            call: number of the micro-batch.
            index: of the layer.
        """

        def add(terms: Tensor) -> None:
            self._by_channel[call] += terms
            if index is not None:
                self._by_layer[call, index] += terms.sum()

        _when_known(tensor, value, add)

    def _call(self, place: str) -> int:
        """Which micro-batch is passing: every schedule takes a chunk through them in their order."""
        self._seen[place] += 1
        return self._seen[place] - 1

    @torch.no_grad()
    def _norm(self, index: int, gain: Tensor, bias: Tensor | None, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """The residual stream on its way into a norm, `[s, b, h]`, or `[s/tp, b, h]`."""
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
    """Length of the weights that read each of this rank's columns, float64 `[in/tp]`."""
    return linear.weight.detach().double().norm(dim=0)


def _when_known(tensor: Tensor, value: Tensor, add: Callable[[Tensor], None]) -> None:
    """Adds up value times gradient over tokens as soon as the backward pass gets there.

    Args:
        tensor: whose gradient is the value's.
        value: `[s, b, n]`.
        add: takes the sums, float64 `[n]`.
    """
    # An alias, for the pipeline takes the memory of what was sent on out of the tensor itself; and dropped when it was
    # used, for the graph lives on until the next micro-batch has run forward.
    waiting = [value.detach()]
    tensor.register_hook(lambda gradient: add(_over_tokens(waiting.pop(), gradient)))


def _over_tokens(*factors: Tensor) -> Tensor:
    """The product of tensors `[s, b, n]`, summed over tokens in float64: `[n]`.

    By a few tokens at a time, since torch would make a float64 copy of all of them first.
    """
    batch, columns = factors[0].shape[1:]
    total = factors[0].new_zeros(columns, dtype=torch.float64)
    for parts in zip(*(factor.split(max(1, _BLOCK // (batch * columns))) for factor in factors), strict=True):
        product = parts[0].double()
        for part in parts[1:]:
            product = product * part
        total += product.sum((0, 1))
    return total
