"""Model interface of lm-evaluation-harness for a sharded Megatron model.

Only rank 0 imports this module and runs the harness; it dispatches requests to the other ranks. Tasks are therefore
read, and their code is run, once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.evaluation.dispatcher import GenerationRequest, Rank0Dispatcher
from megatron_capgap.evaluation.scoring import ScoringRow

_MAY_RUN_CODE = "HF_ALLOW_CODE_EVAL"
"""The environment variable that the library `evaluate` checks; HumanEval checks it while it is loaded."""
_REPORTED = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "samples")


class MegatronLM(TemplateLM):
    """Answers the tasks' requests with the same tokens and windows as lm-evaluation-harness's own `hf` model.

    Args:
        ranks: the model.
        bos: start each text with the tokenizer's bos token, whether or not the tokenizer does.
        truncate: truncate contexts that are too long on the left, as `hf` does, instead of refusing them.
    """

    def __init__(self, ranks: Rank0Dispatcher, *, bos: bool, truncate: bool) -> None:
        super().__init__()
        self._ranks, self._bos, self._truncate = ranks, bos, truncate
        self._words, self._longest = ranks.tokenizer, ranks.scorer.longest
        if self._words.eos is None or (bos and self._words.bos is None):
            missing = "eos" if self._words.eos is None else "bos"
            raise UserError(f"--tokenizer: has no {missing} token, with which requests start or end; add one")

    @property
    def eot_token_id(self) -> int:
        assert self._words.eos is not None, "refused at the start"
        return self._words.eos

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._words.bos is None else self._words.bos

    @property
    def tokenizer_name(self) -> str:
        return self._words.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        ids, words = self._words.encode(string), self._words
        if add_special_tokens is False or ids[:1] == [self.prefix_token_id]:  # the text already starts with it
            return ids
        before = (words.bos,) if self._bos and words.bos not in words.before else words.before
        return [*before, *ids, *words.after]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **unused: Any) -> list[tuple[float, bool]]:
        return [
            (score.log_likelihood, score.greedy)
            for score in self._ranks.score([self._row(*request[1:]) for request in requests])
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [list(map(make_disjoint_window, self._windows(request.args[0]))) for request in requests]
        scores = iter(self._ranks.score([self._row(*window) for text in windows for window in text]))
        return [sum(next(scores).log_likelihood for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [(number, *request.args) for number, request in enumerate(requests)]
        answers: dict[int, str] = {}
        for _, group in groupby(sorted(asked, key=lambda ask: repr(ask[2])), key=lambda ask: repr(ask[2])):
            alike = list(group)
            decoding = _decoding(alike[0][2])
            prompts = [self._prompt(text, decoding.most) for _, text, _ in alike]
            for (number, *_), new in zip(alike, self._ranks.generate(prompts, decoding), strict=True):
                answers[number] = _before(self._words.decode(new), decoding.until)
        return [answers[number] for number in range(len(requests))]

    def _windows(self, text: str) -> Any:
        """Windows of a text as (context, continuation), so that each token is predicted exactly once."""
        return get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._longest,
            context_len=1,
        )

    def _row(self, context: list[int], continuation: list[int]) -> ScoringRow:
        tokens = [*context, *continuation]
        if len(continuation) > self._longest:
            raise UserError(
                f"a continuation of {len(continuation)} tokens exceeds the model's {self._longest}; remove it"
            )
        return ScoringRow(tuple(self._fitted(tokens, self._longest + 1)), len(continuation))

    def _prompt(self, text: str, most: int) -> list[int]:
        room = self._longest - most
        if room < 1:
            raise UserError(
                f"max_gen_toks: {most} new tokens leave no room for a prompt in the model's {self._longest}; "
                "lower it in the task's generation_kwargs"
            )
        return self._fitted(self.tok_encode(text) or [self.prefix_token_id], room)

    def _fitted(self, tokens: list[int], room: int) -> list[int]:
        """The last `room` tokens."""
        vocab = self._ranks.scorer.vocab_size
        if wrong := next((token for token in tokens if token >= vocab), None):
            raise UserError(
                f"a request has the token {self._words.pieces()[wrong]!r} ({wrong}), which has no row in the model's "
                f"vocab of {vocab}; use the model's own tokenizer"
            )
        if len(tokens) > room and not self._truncate:
            raise UserError(
                f"a request of {len(tokens)} tokens exceeds the {room} that the model of {self._longest} has for "
                "it; use fewer examples (--shots), or truncate contexts on the left (--truncate)"
            )
        return tokens[-room:]


def run_tasks(
    model: MegatronLM, tasks: Sequence[str], *, limit: int | None, shots: int | None, log_samples: bool, unsafe: bool
) -> dict[str, Any]:
    """Runs tasks. Rank 0 only.

    Args:
        model: the model.
        tasks: names of the harness's registry, patterns of names, and YAML files.
        limit: documents of each task; None uses all.
        shots: examples before each question; None uses the task's number.
        log_samples: keep every request and its answer in the results.
        unsafe: whether tasks may run code that the model writes.

    Returns:
        The harness's results, reduced to numbers and texts.

    Raises:
        UserError: a task does not exist, cannot be read, or needs something that the model does not support.
    """
    if unsafe:
        os.environ[_MAY_RUN_CODE] = "1"
    manager = _Manager(unsafe, registry=any(map(_asks_registry, tasks)))
    chosen = [task for name in tasks for task in _find(manager, name)]
    results = simple_evaluate(
        model,
        tasks=chosen,
        num_fewshot=shots,
        limit=limit,
        log_samples=log_samples,
        task_manager=manager,
        confirm_run_unsafe_code=unsafe,
    )
    return {name: results[name] for name in _REPORTED if name in results}


def _asks_registry(name: str) -> bool:
    """Whether a task needs the harness's registry: one of its tasks, or a group in a file, which may refer to some."""
    file = Path(name)
    return not file.is_file() or re.search(r"^group\s*:", file.read_text(errors="replace"), re.MULTILINE) is not None


class _Manager(TaskManager):
    """Loads tasks, or raises an error of one line.

    Args:
        unsafe: whether tasks may run code.
        registry: whether to index the harness's own tasks, which takes about ten seconds.
    """

    def __init__(self, unsafe: bool, registry: bool) -> None:
        super().__init__(include_defaults=registry)
        self._unsafe = unsafe

    def load(self, task_list: Any) -> Any:
        try:
            loaded = super().load(task_list)
        except Exception as error:  # the harness and data set readers raise arbitrary exceptions
            if _MAY_RUN_CODE in str(error) and not self._unsafe:
                raise _refused("one of them") from error
            raise UserError(f"--tasks: {in_one_line(error, 300)}; correct the task or its data") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self._unsafe:
                raise _refused(name)
        return loaded


def _refused(task: str) -> UserError:
    return UserError(f"--tasks: {task} runs code that the model writes; allow it with --run-code")


def _find(manager: TaskManager, name: str) -> list[str]:
    """Tasks that match a name, a pattern of names or a YAML file."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"--tasks: {name}: no such file; give a task's YAML file, or a name of the registry")
        return [name]
    if found := manager.match_tasks([name]):
        return found
    raise UserError(f"--tasks: {name}: no such task; `lm-eval ls tasks` lists them, or give a task's YAML file")


def _decoding(asked: dict[str, Any]) -> GenerationRequest:
    """Converts a task's generation_kwargs."""
    options = normalize_gen_kwargs(asked)
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    names = ("temperature", "top_k", "top_p") if options.get("do_sample") else ()
    sampling = {name: options[name] for name in names if name in options}
    return GenerationRequest(options["max_gen_toks"], tuple(filter(None, until)), tuple(sampling.items()))


def _before(text: str, ends: Sequence[str]) -> str:
    """The text before the first occurrence of any of the ends."""
    for end in ends:
        text = text.split(end)[0]
    return text
