"""One rank decides what is computed, and all of them compute it."""

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
    """How texts are continued."""

    most: int
    """New tokens at most."""
    until: tuple[str, ...] = ()
    """Texts of which each ends a continuation."""
    sampling: tuple[tuple[str, float], ...] = ()
    """Arguments of `generation.Sampling`; none take the likeliest token."""


@dataclass(frozen=True)
class Rank0Dispatcher:
    """All ranks of a model. Rank 0 calls `score`, `generate` and at the end `dismiss`; the others call `follow`.

    Args:
        scorer: the model.
        tokenizer: what it reads.
        ends: ids that end a text.
    """

    scorer: Scorer
    tokenizer: Tokenizer
    ends: frozenset[int]

    def score(self, rows: Sequence[ScoringRow]) -> list[Score]:
        """Scores rows that are no longer than the model reads."""
        return self._all("_score", rows)

    def generate(self, prompts: Sequence[Sequence[int]], decoding: GenerationRequest) -> list[list[int]]:
        """New ids for each prompt; a text of `until` may stand at their end."""
        return self._all("_generate", prompts, decoding)

    def worker_loop(self) -> None:
        """Computes what rank 0 asks for until it dismisses the others."""
        while call := self._broadcast(None):
            with suppress(UserError):  # all ranks meet it alike; rank 0 tells of it, and dismisses
                getattr(self, call[0])(*call[1:])

    def shutdown(self) -> None:
        """Lets the others go."""
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
