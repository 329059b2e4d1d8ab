"""The decoding loop: in each step every row of a batch processes one token, of its prompt or a generated one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_capgap.common.errors import UserError
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.generation.sampling import GREEDY, Sampling, choose
from megatron_capgap.models.gpt import unwrap
from megatron_capgap.models.kv_cache import CachedForward, whole_sequences

_FAILED = -1  # in place of an id if the logits are not finite
_FILLER = 0  # input of a finished row


def generate(
    chunks: Sequence[torch.nn.Module],
    parallel: ParallelContext,
    prompts: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    max_new_tokens: int,
    ends: Set[int],
    sampling: Sampling = GREEDY,
    stop: Callable[[list[int]], bool] | None = None,
    batch: int = 32,
) -> list[list[int]]:
    """Continues prompts. Collective over all ranks of the layout, which pass the same arguments.

    Prompts of similar length share a batch; batches are distributed over data-parallel ranks. Except for rounding, a
    prompt's continuation depends neither on the other prompts nor on the layout.

    Args:
        chunks: this rank's model chunks, with weights.
        parallel: their layout.
        prompts: token ids, of any lengths.
        vocab_size: number of real columns of the LM head; the rest is padding.
        max_new_tokens: maximum number of new tokens per prompt.
        ends: the ids that end a text.
        sampling: how tokens are chosen; draws are numbered by the prompt's index in `prompts`.
        stop: called with a prompt's new ids after each of them; returns whether the prompt is finished. It must depend
            on these ids only, because every rank calls its own.
        batch: prompts in one forward pass of a data-parallel rank.

    Returns:
        For each prompt its new ids, without the id that ends it; the same on every rank.

    Raises:
        UserError: a prompt is empty, contains an id outside the vocabulary, or exceeds the model's sequence length
            together with the new tokens; the layout or precision does not support generation; logits are not finite.
    """
    _check(chunks, parallel, prompts, vocab_size, max_new_tokens)
    in_order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    mine = in_order[parallel.dp_rank :: parallel.dp_size]
    found: dict[int, list[int] | None] = {}
    with _inference(chunks):
        for start in range(0, len(mine), batch):
            rows = [_Sequence(number, prompts[number]) for number in mine[start : start + batch]]
            _decode(chunks, parallel, rows, vocab_size, max_new_tokens, ends, sampling, stop)
            found |= {row.number: row.new for row in rows}
    parts: list[dict[int, list[int] | None]] = [{} for _ in range(parallel.dp_size)]
    dist.all_gather_object(parts, found, group=parallel.groups.dp)
    everything = {number: new for part in parts for number, new in part.items()}
    if failed := sorted(number for number, new in everything.items() if new is None):
        raise UserError(f"prompt {failed[0]}: the model's logits are not finite; inspect the checkpoint's weights")
    return [everything[number] or [] for number in range(len(prompts))]


class _Sequence:
    """State of one prompt."""

    def __init__(self, number: int, prompt: Sequence[int]) -> None:
        self.number = number
        self.tokens = list(prompt)  # prompt, then chosen tokens, then fillers
        self.new: list[int] | None = []
        self.done = False

    def take(self, token: int, most: int, ends: Set[int], stop: Callable[[list[int]], bool] | None) -> None:
        """Appends a chosen token."""
        self.tokens.append(token if token != _FAILED else _FILLER)
        assert self.new is not None
        if token == _FAILED:
            self.new = None
        elif token not in ends:
            self.new.append(token)
        ended = token == _FAILED or token in ends or len(self.new or ()) == most
        self.done = ended or bool(stop and stop(list(self.new or ())))


def _decode(
    chunks: Sequence[torch.nn.Module],
    parallel: ParallelContext,
    rows: list[_Sequence],
    vocab_size: int,
    most: int,
    ends: Set[int],
    sampling: Sampling,
    stop: Callable[[list[int]], bool] | None,
) -> None:
    """Generates the rows' new ids. One pass reads all rows up to the shortest prompt's length; then each step feeds the
    chosen token, or the next prompt token of a longer prompt."""
    device = next(chunks[0].parameters()).device
    forward = CachedForward(chunks, parallel, len(rows), max(len(row.tokens) for row in rows) + most)
    read = 0
    while not all(row.done for row in rows):
        known = min(len(row.tokens) for row in rows)
        logits = forward.step(torch.tensor([row.tokens[read:known] for row in rows], device=device))
        read = known
        chosen = _agree(logits, parallel, rows, vocab_size, sampling, device)
        for row, token in zip(rows, chosen, strict=True):
            if len(row.tokens) > read:
                continue  # still within its prompt
            if row.done:
                row.tokens.append(_FILLER)
            else:
                row.take(token, most, ends, stop)


def _agree(
    logits: Tensor | None,
    parallel: ParallelContext,
    rows: list[_Sequence],
    vocab_size: int,
    sampling: Sampling,
    device: torch.device,
) -> list[int]:
    """Distributes the ids that the last stage chooses to every stage. Collective: one broadcast over the
    pipeline-parallel ranks."""
    ids = torch.empty(len(rows), dtype=torch.int64, device=device)
    if logits is not None:
        draws = [(row.number, len(row.new or ())) for row in rows]
        chosen = choose(logits[:, :vocab_size], sampling, draws)
        ids.copy_(torch.tensor([_FAILED if token is None else token for token in chosen]))
    if parallel.layout.pipeline > 1:
        last = dist.get_global_rank(parallel.groups.pp, parallel.layout.pipeline - 1)
        dist.broadcast(ids, last, group=parallel.groups.pp)
    return ids.tolist()


@contextmanager
def _inference(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Disables dropout, gradients and sequence parallelism; restores the previous state on exit."""
    training = [chunk.training for chunk in chunks]
    try:
        with torch.no_grad(), whole_sequences(chunks):
            for chunk in chunks:
                chunk.eval()
            yield
    finally:
        for chunk, before in zip(chunks, training, strict=True):
            chunk.train(before)


def _check(
    chunks: Sequence[torch.nn.Module],
    parallel: ParallelContext,
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    most: int,
) -> None:
    model = unwrap(chunks[0])
    if parallel.layout.context > 1:
        raise UserError(f"layout.context: {parallel.layout.context}; generation does not shard the context; use 1")
    if model.config.fp8:
        raise UserError(f"precision.fp8: {model.config.fp8}; generation runs in bf16 or fp32; remove the key")
    if most < 1:
        raise UserError(f"max_new_tokens: {most} is less than 1")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number}: is empty; give at least one token, e.g. the one that starts a text")
        if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
            raise UserError(f"prompt {number}: id {wrong[0]} is outside the model's {vocab_size} tokens")
        if len(prompt) + most > model.max_sequence_length:
            raise UserError(
                f"prompt {number}: its {len(prompt)} tokens and {most} new ones exceed the "
                f"{model.max_sequence_length} of the model; shorten the prompt, or generate fewer tokens"
            )
