"""Rank 0 dispatches scoring and generation requests; all ranks execute them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.tokenizer import Tokenizer
from megatron_capgap.evaluation.scoring import Score, Scorer, ScoringRow


@dataclass(frozen=True)
class GenerationRequest:
    """Settings of a continuation."""

    most: int
    """Maximum number of new tokens."""
    until: tuple[str, ...] = ()
    """Texts each of which ends a continuation."""
    sampling: tuple[tuple[str, float], ...] = ()
    """Arguments of `generation.Sampling`; empty selects greedy decoding."""


@dataclass(frozen=True)
class Rank0Dispatcher:
    """Executes requests on all ranks of a model.

    Rank 0 calls `score`, `generate` and finally `shutdown`; the other ranks call `worker_loop`.

    Args:
        scorer: the model.
        tokenizer: its tokenizer.
        ends: ids that end a text.
    """

    scorer: Scorer
    tokenizer: Tokenizer
    ends: frozenset[int]

    def score(self, rows: Sequence[ScoringRow]) -> list[Score]:
        """Scores rows that are no longer than the model's maximum length."""
        return self._all("_score", rows)

    def generate(self, prompts: Sequence[Sequence[int]], decoding: GenerationRequest) -> list[list[int]]:
        """New ids for each prompt; they may end with a text of `until`."""
        return self._all("_generate", prompts, decoding)

    def worker_loop(self) -> None:
        """Executes rank 0's requests until it calls `shutdown`."""
        while call := self._broadcast(None):
            with suppress(UserError):  # raised on all ranks; rank 0 reports it and shuts the others down
                getattr(self, call[0])(*call[1:])

    def shutdown(self) -> None:
        """Ends `worker_loop` on the other ranks."""
        self._broadcast(None)

    def _all(self, *call: Any) -> Any:
        self._broadcast(call)
        return getattr(self, call[0])(*call[1:])

    def _broadcast(self, call: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        message = [call]
        dist.broadcast_object_list(message, src=0)
        return message[0]

    def _score(self, rows: Sequence[ScoringRow]) -> list[Score]:
        return self.scorer(rows)

    def _generate(self, prompts: Sequence[Sequence[int]], decoding: GenerationRequest) -> list[list[int]]:
        from megatron_capgap.generation import Sampling, generate

        def ended(new: list[int]) -> bool:
            text = self.tokenizer.decode(new)
            return any(end in text for end in decoding.until)

        arguments: dict[str, Any] = dict(decoding.sampling)
        return generate(
            self.scorer.chunks,
            self.scorer.parallel,
            prompts,
            vocab_size=self.scorer.vocab_size,
            max_new_tokens=decoding.most,
            ends=self.ends,
            sampling=Sampling(**arguments),
            stop=ended if decoding.until else None,
            batch=self.scorer.micro_batch,
        )
