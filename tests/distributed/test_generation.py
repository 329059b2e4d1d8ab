"""Generation with a cache says what the plain forward pass says, read from scratch for every token, in any layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from megatron_capgap.checkpoint import loader, metadata, run_directory
from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import Layout, Precision
from megatron_capgap.data.tokenizer import open_tokenizer
from megatron_capgap.devices import choose as choose_device
from megatron_capgap.distributed import parallel_context as layouts
from megatron_capgap.distributed.parallel_context import ParallelContext
from megatron_capgap.generation import Sampling, generate
from megatron_capgap.generation.sampling import choose
from megatron_capgap.models import gpt, pipeline_schedule
from tests.distributed.test_families import imported
from tests.support import corpus
from tests.support.pool import WorkerPool
from tests.support.runs import VOCAB, Fixtures
from tools import generate as generate_tool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2_virtual_dp2": (4, {"pipeline": 2, "virtual_pipeline": 2}),
}
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.8, seed=3)
PROMPTS = [[5, 9, 200, 7, 7, 3, 44], [11], [90, 91], [5, 9, 200, 7, 7, 3, 44], [17, 260, 31, 4, 8]]
MOST, LONGEST = 9, 24


def opened(run: Path, cut: dict[str, Any]) -> tuple[list[torch.nn.Module], ParallelContext]:
    """The model of a run directory in a layout, on this rank."""
    device = choose_device("cpu", 0)
    parallel = layouts.build(Layout(**cut), seed=0)
    folder = run_directory.locate(str(run))
    chunks = gpt.build(metadata.read(folder).model, parallel, Precision(), device, sequence_length=LONGEST)
    loader.load_weights(folder, chunks, parallel)
    return chunks, parallel


def logits_from_scratch(chunks: list[torch.nn.Module], parallel: ParallelContext, tokens: list[int]) -> torch.Tensor:
    """`[v]` after the last token, by the schedule that training runs; the same on every rank."""
    length = len(tokens) + len(tokens) % 2  # sequence parallelism cuts it; what comes behind is not looked at
    ids = torch.tensor([tokens + [0] * (length - len(tokens))])
    mine = SimpleNamespace(tokens=ids, position_ids=torch.arange(length)[None], attention_mask=None)
    found = torch.zeros(VOCAB)

    def last_stage(hidden: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        parts = [hidden]
        if parallel.layout.sequence:
            parts = [torch.empty_like(hidden) for _ in range(parallel.layout.tensor)]
            dist.all_gather(parts, hidden.contiguous(), group=parallel.groups.tp)
        shard = torch.cat(parts)[len(tokens) - 1, 0] @ gpt.unwrap(chunks[-1]).lm_head().t()
        shards = [torch.empty_like(shard) for _ in range(parallel.layout.tensor)]
        dist.all_gather(shards, shard, group=parallel.groups.tp)
        found.copy_(torch.cat(shards)[:VOCAB])
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), None

    with torch.no_grad():
        pipeline_schedule.run(
            chunks, parallel, [mine] * parallel.layout.pipeline, last_stage, forward_only=True, shape=(length, 1)
        )
    if parallel.layout.pipeline > 1:
        dist.all_reduce(found, group=parallel.groups.pp)
    return found


def from_scratch(
    chunks: list[torch.nn.Module], parallel: ParallelContext, sampling: Sampling, prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Greedy and drawn continuations without any cache, batch or padding."""
    for chunk in chunks:
        chunk.eval()
    everything = []
    for number, prompt in enumerate(prompts):
        new: list[int] = []
        while len(new) < MOST:
            logits = logits_from_scratch(chunks, parallel, prompt + new)
            (token,) = choose(logits[None], sampling, [(number, len(new))])
            assert token is not None
            new.append(token)
        everything.append(new)
    return everything


def both_ways(run: Path, cut: dict[str, Any]) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Greedy, greedy with an end of text, drawn, drawn with an end of text: (generated, from scratch)."""
    chunks, parallel = opened(run, cut)
    found = []
    for sampling in (Sampling(), DRAWN):
        how: dict[str, Any] = {"vocab_size": VOCAB, "max_new_tokens": MOST, "sampling": sampling, "batch": 3}
        free = generate(chunks, parallel, PROMPTS, ends=frozenset(), **how)
        assert all(chunk.training for chunk in chunks)
        eos = free[0][4]  # ends the first prompt early, and others or not
        ended = generate(chunks, parallel, PROMPTS, ends={eos}, **how)
        expected = from_scratch(chunks, parallel, sampling, PROMPTS)
        found.append((free, expected))
        found.append((ended, [new[: new.index(eos)] if eos in new else new for new in expected]))
        for chunk in chunks:
            chunk.train()
    return found


@pytest.fixture(scope="module")
def run_of(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run directory of a family's tiny model, made once."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = imported(pool, fixtures, name, 0, tmp_path_factory.mktemp(name))
        return made[name]

    return find


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("llama3", layout) for layout in LAYOUTS),
        ("mistral", "tp2_pp2"),
        ("qwen2", "tp2"),
        *((name, layout) for name in ("gpt2", "gpt_neox") for layout in ("one", "tp2_sp", "tp2_pp2")),
        ("qwen3", "tp2_sp"),
    ],
)
def test_the_cache_changes_nothing(pool: WorkerPool, run_of: Any, name: str, layout: str) -> None:
    world, cut = LAYOUTS[layout]
    ranks = pool.run(both_ways, run_of(name), cut, world=world)
    assert all(rank == ranks[0] for rank in ranks)
    for found, expected in ranks[0]:
        assert found == expected
    greedy, greedy_ended, drawn, drawn_ended = (found for found, _ in ranks[0])
    assert greedy[0] == greedy[3] and drawn[0] != drawn[3], "prompts draw their own tokens"
    assert {len(new) for new in greedy + drawn} == {MOST}
    assert len(greedy_ended[0]) < MOST and len(drawn_ended[0]) < MOST


def continuations(run: Path, cut: dict[str, Any], batch: int) -> list[list[int]]:
    chunks, parallel = opened(run, cut)
    how: dict[str, Any] = {"vocab_size": VOCAB, "max_new_tokens": MOST, "ends": frozenset(), "batch": batch}
    return [generate(chunks, parallel, PROMPTS, sampling=sampling, **how) for sampling in (Sampling(), DRAWN)]


def test_layout_and_batch_change_nothing(pool: WorkerPool, run_of: Any) -> None:
    run = run_of("llama3")
    expected = pool.run(continuations, run, {}, 1, world=1)[0]
    for (world, cut), batch in zip(LAYOUTS.values(), (5, 4, 2, 32, 3, 1), strict=True):
        assert pool.run(continuations, run, cut, batch, world=world) == [expected] * world


def test_the_tool_says_what_transformers_says(
    pool: WorkerPool, run_of: Any, fixtures: Fixtures, tmp_path: Path
) -> None:
    """Through text, greedy; the prompts differ in length, and two data-parallel ranks share them."""
    run, tokenizer = run_of("llama3"), open_tokenizer(fixtures.data["tokenizer"])
    texts = ["the green river", "a", "some stone of the old house", "water"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["--checkpoint", str(run), "--tokenizer", fixtures.data["tokenizer"], "--device", "cpu", "--tensor", "2"]
    words += ["--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "6"]
    assert pool.run(generate_tool.main, words, world=4, initialise=False) == [0] * 4
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(run.parent / "hf")
    for text, line in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos, pad_token_id=0)
        new = [token for token in out[0, ids.shape[1] :].tolist() if token != tokenizer.eos]
        assert line == {"prompt": text, "text": tokenizer.decode(new)}


def test_what_the_tool_refuses(pool: WorkerPool, run_of: Any, fixtures: Fixtures, tmp_path: Path) -> None:
    other = corpus.save_sentencepiece(tmp_path / "other.model")
    fit = {
        "--checkpoint": str(run_of("gpt2")),
        "--tokenizer": fixtures.data["tokenizer"],
        "--prompt": "a",
        "--max-new-tokens": "4",
    }
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    cases: dict[str, dict[str, str | None]] = {
        f"--tokenizer: {other} differs from the tokenizer that": {"--tokenizer": other},
        "--tensor 5 * --pipeline 1 does not divide the world size 1": {"--tensor": "5"},
        "exceeds the 64 tokens that the model supports; use fewer": {"--max-new-tokens": "64"},
        "temperature: -1.0 must be at least 0": {"--temperature": "-1"},
        "nothing: no such checkpoint; name a run directory": {"--checkpoint": "nothing"},
        "has no chat template; use template default": {"--prompt": None, "--prompts": str(talk)},
    }
    for message, change in cases.items():
        words = [word for pair in {**fit, **change}.items() if pair[1] is not None for word in pair]
        (rank,) = pool.run(generate_tool.main, words, world=1, initialise=False, capture=True)
        assert rank.value == 2 and message in rank.stderr and rank.stderr.count("\n") == 1, rank.stderr


def stopped(run: Path) -> tuple[list[list[int]], list[list[int]]]:
    chunks, parallel = opened(run, {"pipeline": 2})
    how: dict[str, Any] = {"vocab_size": VOCAB, "max_new_tokens": MOST, "ends": frozenset()}
    free = generate(chunks, parallel, PROMPTS, **how)
    pair = free[0][2:4]
    return free, generate(chunks, parallel, PROMPTS, stop=lambda new: new[-2:] == pair, **how)


def test_stop_ends_one_prompt_and_keeps_its_last_token(pool: WorkerPool, run_of: Any) -> None:
    for free, found in pool.run(stopped, run_of("gpt2"), world=2):
        pair = free[0][2:4]
        for whole, new in zip(free, found, strict=True):
            ends = [k + 2 for k in range(MOST - 1) if whole[k : k + 2] == pair]
            assert new == whole[: ends[0] if ends else MOST]


def refused(run: Path) -> list[str]:
    chunks, parallel = opened(run, {})
    found = []
    cases: list[tuple[list[list[int]], int]] = [([[1], []], 3), ([[1, VOCAB]], 3), ([[1]], 0), ([[1] * 20], 45)]
    for prompts, most in [*cases, ([[7]], 3)]:
        if prompts == [[7]]:
            gpt.unwrap(chunks[0]).embedding.word_embeddings.weight.data[7] = float("nan")
        try:
            generate(chunks, parallel, prompts, vocab_size=VOCAB, max_new_tokens=most, ends=frozenset())
        except UserError as error:
            found.append(str(error))
    return found


def test_bad_input_is_refused(pool: WorkerPool, run_of: Any) -> None:
    assert pool.run(refused, run_of("gpt2"), world=1)[0] == [
        "prompt 1: is empty; give at least one token, e.g. the one that starts a text",
        f"prompt 0: id {VOCAB} is outside the model's {VOCAB} tokens",
        "max_new_tokens: 0 is less than 1",
        "prompt 0: its 20 tokens and 45 new ones exceed the 64 of the model; "
        "shorten the prompt, or generate fewer tokens",
        "prompt 0: the model's logits are not finite; inspect the checkpoint's weights",
    ]
