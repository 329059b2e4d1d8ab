"""A checkpoint whose vocabulary grows: the new rows, the old logits, every layout, and training that goes on."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_capgap.checkpoint import metadata, run_directory, vocab_expansion
from megatron_capgap.config.schema import Layout, ModelShape
from megatron_capgap.data import sentencepiece_proto
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import dense, hf_models, languages, pruning, runs
from tests.support.corpus import write_jsonl
from tests.support.plain_steps import Weights
from tests.support.pool import RankResult, WorkerPool
from tests.support.runs import Fixtures
from tools import convert_hf, expand_vocab, prepare_data

OVER_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def expand_in_small_blocks(words: list[str]) -> int:
    """Runs in a worker: the tool, with blocks of a few rows, so that new rows take from many."""
    from megatron_capgap.checkpoint import streaming

    whole, streaming.BLOCK_BYTES = streaming.BLOCK_BYTES, 40 * 48 * 4
    try:
        return expand_vocab.main(words)
    finally:
        streaming.BLOCK_BYTES = whole


def expand(pool: WorkerPool, *words: object, world: int = 1) -> list[RankResult]:
    texts = [str(word) for word in words]
    return pool.run(expand_in_small_blocks, texts, world=world, initialise=False, capture=True)


def must(pool: WorkerPool, *words: object, world: int = 1) -> str:
    """What the first rank says of a call that succeeds on all."""
    ranks = expand(pool, *words, world=world)
    assert [rank.value for rank in ranks] == [0] * world, ranks
    assert all(not rank.stdout for rank in ranks[1:]), "only the first rank speaks"
    return ranks[0].stdout


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second model."""
    return languages.train(tmp_path_factory.mktemp("chinese") / "zh.model", languages.chinese(), "bpe", 900)


def weights_of(pool: WorkerPool, run_dir: Path) -> tuple[ModelShape, Weights]:
    shape = metadata.read(run_directory.locate(str(run_dir))).model
    return shape, pool.run(dense.megatron_weights, dense.Source(shape, 0, run_dir), world=1)[0]


def assert_grown(pool: WorkerPool, old_dir: Path, new_dir: Path, tokenizer: Path) -> None:
    """Every weight against a reference written out: old rows as they were, new ones the mean of what they split
    into."""
    (old_shape, old), (shape, new) = weights_of(pool, old_dir), weights_of(pool, new_dir)
    raw = sentencepiece_proto.read(tokenizer).processor_of_pieces()
    grown = open_tokenizer(str(new_dir / "tokenizer.model"))
    known = raw.get_piece_size()
    assert shape == replace(old_shape, vocab=max(grown.vocab_size, old_shape.vocab))
    assert old.keys() == new.keys() and grown.vocab_size > known + 300
    for name, weight in old.items():
        if name not in OVER_VOCABULARY:
            assert torch.equal(new[name], weight), name
            continue
        assert torch.equal(new[name][:known], weight[:known])
        for token in range(known, grown.vocab_size):
            piece = grown.pieces()[token]
            mean = weight[raw.encode(piece)].double().mean(0).to(weight.dtype)
            assert torch.equal(new[name][token], mean), (name, piece)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_new_rows_are_means_and_the_rest_is_as_it_was(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, chinese: Path, tmp_path: Path, world: int
) -> None:
    tokenizer = fixtures.folder / "tokenizer.model"
    words = ["--tokenizer", tokenizer, "--add", chinese, "--checkpoint", teacher, "--out", tmp_path / "grown"]
    said = must(pool, *words, world=world)
    assert_grown(pool, teacher, tmp_path / "grown", tokenizer)
    found = metadata.read(run_directory.locate(str(tmp_path / "grown")))
    assert f"vocabulary {runs.VOCAB} -> {found.model.vocab}" in said
    old = metadata.read(run_directory.locate(str(teacher)))
    assert found.expanded_from == metadata.ModelRef.of(run_directory.locate(str(teacher)), old)
    assert found.tokenizer_fingerprint == open_tokenizer(found.tokenizer).fingerprint != old.tokenizer_fingerprint
    assert (found.step, found.tokens, found.stage, found.sequence_length) == (0, 0, "expand_vocab", 32)


@pytest.mark.parametrize("name", ["smollm", "gpt2", "qwen2", "gpt_neox"])
def test_every_family_tied_or_not(
    pool: WorkerPool, fixtures: Fixtures, chinese: Path, tmp_path: Path, name: str
) -> None:
    model = hf_models.build(name).to(torch.bfloat16 if name == "qwen2" else torch.float32)
    old, tokenizer = pruning.imported(pool, fixtures, model, tmp_path), tmp_path / "tokenizer"
    tokenizer.mkdir()  # without the model, whose class transformers would take for the tokenizer's
    shutil.copyfile(fixtures.folder / "tokenizer.model", tokenizer / "tokenizer.model")
    must(pool, "--tokenizer", tokenizer, "--add", chinese, "--checkpoint", old, "--out", tmp_path / "grown", world=2)
    words = ["export", "--checkpoint", str(tmp_path / "grown"), "--out", str(tmp_path / "hf_grown")]
    (exported,) = pool.run(convert_hf.main, words, world=1, initialise=False, capture=True)
    assert exported.value == 0, exported.stderr
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "hf_grown")
    assert grown.dtype == model.dtype
    raw = sentencepiece_proto.read(tokenizer / "tokenizer.model").processor_of_pieces()
    spoken = open_tokenizer(str(tmp_path / "grown"))
    for mine, theirs in zip(
        (grown.get_input_embeddings(), grown.get_output_embeddings()),
        (model.get_input_embeddings(), model.get_output_embeddings()),
        strict=True,
    ):
        means = [theirs.weight[raw.encode(piece)].double().mean(0) for piece in spoken.pieces()[runs.VOCAB :]]
        expected = torch.cat([theirs.weight, torch.stack(means).to(model.dtype)])
        assert torch.equal(mine.weight, expected)
    # transformers 5 opens a qwen2 with a class of its own, whatever its tokenizer; whoever exports one is told.
    for said in (exported.stdout, (tmp_path / "hf_grown" / "README.md").read_text()):
        assert ("auto_map in tokenizer_config.json" in said) == (name == "qwen2")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf_grown", trust_remote_code=name == "qwen2")
    for text in languages.chinese()[:50]:
        assert theirs(text, add_special_tokens=False).input_ids == spoken.encode(text)


def test_rows_beyond_the_vocabulary_are_no_tokens(
    pool: WorkerPool, fixtures: Fixtures, chinese: Path, tmp_path: Path
) -> None:
    """A model with more rows than its tokenizer has tokens, written by a layout that pads those too."""
    tokenizer = fixtures.folder / "tokenizer.model"
    for vocab in (309, 2001):
        changes: dict[str, Any] = {"student__model": {**runs.STUDENT, "vocab": vocab}, "train__steps": 1}
        raw = runs.adapt_config(fixtures, tmp_path / f"old{vocab}", student__layout={"tensor": 2}, **changes)
        old, new = runs.train(pool, "adapt", raw, 2), tmp_path / f"grown{vocab}"
        must(pool, "--tokenizer", tokenizer, "--add", chinese, "--checkpoint", old, "--out", new)
        assert_grown(pool, old, new, tokenizer)
    (_, old_weights), (shape, weights) = weights_of(pool, old), weights_of(pool, new)
    behind = open_tokenizer(str(new)).vocab_size
    assert shape.vocab == 2001 and behind < 2001
    for name in OVER_VOCABULARY:
        assert torch.equal(weights[name][behind:2001], old_weights[name][behind:2001])


def logits(run_dir: Path, cut: Layout, ids: torch.Tensor) -> torch.Tensor | None:
    """Runs in a worker: the logits `[b, s, v]` of a checkpoint, on the ranks of the last stage."""
    from megatron_capgap.conversion import verify
    from megatron_capgap.devices import choose
    from megatron_capgap.distributed import parallel_context

    device, folder = choose("cpu", 0), run_directory.locate(str(run_dir))
    return verify._megatron(folder, metadata.read(folder).model, parallel_context.build(cut, 0), device, ids).logits


def test_old_tokens_keep_their_logits_in_every_layout(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, chinese: Path, tmp_path: Path
) -> None:
    tokenizer = fixtures.folder / "tokenizer.model"
    must(pool, "--tokenizer", tokenizer, "--add", chinese, "--checkpoint", teacher, "--out", tmp_path / "grown")
    ids = torch.randint(runs.VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    (expected,) = pool.run(logits, teacher, Layout(), ids, world=1)
    assert expected is not None and expected.std() > 0.1
    vocab = metadata.read(run_directory.locate(str(tmp_path / "grown"))).model.vocab
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
        cut = Layout(tensor=tensor, pipeline=pipeline)
        parts = pool.run(logits, tmp_path / "grown", cut, ids, world=tensor * pipeline)
        found = [part for part in parts if part is not None]
        assert len(found) == tensor
        for part in found:
            assert part.shape == (2, 24, vocab)
            assert (part[..., : runs.VOCAB] - expected).abs().max() <= 1e-5


def test_adapt_goes_on_in_both_languages(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, chinese: Path, tmp_path: Path
) -> None:
    """Equal losses in two layouts, falling on text that the old model knew byte by byte."""
    grown, tokenizer = tmp_path / "grown", fixtures.folder / "tokenizer.model"
    must(pool, "--tokenizer", tokenizer, "--add", chinese, "--checkpoint", teacher, "--out", grown)
    texts = write_jsonl(tmp_path / "zh.jsonl", languages.chinese())
    words = ["--input", texts, "--tokenizer", str(grown / "tokenizer.model"), "--out", str(tmp_path / "zh")]
    assert prepare_data.main([*words, "--workers", "1"]) == 0
    data = {"tokenizer": str(grown / "tokenizer.model"), "train": [str(tmp_path / "zh")], "sequence_length": 32}
    found = []
    for name, world, cut in (("one", 1, {}), ("cut", 4, {"tensor": 2, "pipeline": 2, "sequence": True})):
        changes = {"student": {"checkpoint": str(grown), "layout": cut}, "data": data, "train__steps": 8}
        raw = runs.adapt_config(fixtures, tmp_path / name, train__eval_batches=None, **changes)
        found.append(runs.steps_of(runs.train(pool, "adapt", raw, world)))
    for mine, theirs in zip(*found, strict=True):
        runs.assert_close(mine, theirs, 2e-5)
    losses = [step["loss"] for step in found[0]]
    assert losses[-1] < losses[0] - 0.5 and all(map(math.isfinite, losses))
    trained = metadata.read(run_directory.locate(str(tmp_path / "cut")))
    assert trained.step == 8 and trained.expanded_from == metadata.read(run_directory.locate(str(grown))).expanded_from


MISTAKES = {
    "all there": (["--add", "FIRST"], "FIRST: FIRST already has all its"),
    "kinds": (["--add", "UNIGRAM"], "UNIGRAM is a unigram model and FIRST a bpe one"),
    "no bytes": (["--tokenizer", "PLAIN", "--checkpoint", ""], "PLAIN has no byte fallback, and"),
    "tokenizer": (["--tokenizer", "CHINESE", "--add", "FIRST"], "--tokenizer is CHINESE"),
    "no first": (["--tokenizer", "FOLDER/nothing.model"], "tokenizer FOLDER/nothing.model does not exist"),
    "no second": (["--add", "FOLDER"], "tokenizer FOLDER/tokenizer.model does not exist"),
    "no model": (["--add", "FOLDER/text.txt"], "tokenizer FOLDER/text.txt is not a SentencePiece model"),
    "no checkpoint": (["--checkpoint", "FOLDER/nobody"], "FOLDER/nobody: no such checkpoint"),
    "no text": (["--text", "FOLDER/nowhere.txt"], "--text FOLDER/nowhere.txt does not exist"),
    "bad line": (["--text", "FOLDER/bad.jsonl"], "--text FOLDER/bad.jsonl:2: not JSON"),
    "out": (["--out", "FOLDER/taken"], "FOLDER/taken: already exists"),
    "not ours": (["--out", "FOLDER/taken", "--force"], "FOLDER/taken: was not written by this command"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_nothing_written(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, chinese: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text"\n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    places = {"FOLDER": tmp_path, "FIRST": fixtures.folder / "tokenizer.model", "CHINESE": chinese}
    for kind, place in (("unigram", "UNIGRAM"), ("bpe", "PLAIN")):
        if place in str(MISTAKES[name]):
            file = tmp_path / f"{place.lower()}.model"
            places[place] = languages.train(file, languages.english(), kind, 400, byte_fallback=place == "UNIGRAM")

    def put(word: str) -> str:
        for key, place in places.items():
            word = word.replace(key, str(place))
        return word

    given = dict(zip(MISTAKES[name][0][::2], [*MISTAKES[name][0][1::2], ""], strict=False))
    words = {"--tokenizer": "FIRST", "--add": "CHINESE", "--checkpoint": str(teacher), "--out": "FOLDER/out", **given}
    before = runs.files_of(tmp_path)
    ranks = expand(
        pool, *[put(part) for pair in words.items() if pair[1] or pair[0] == "--force" for part in pair if part]
    )
    assert [rank.value for rank in ranks] == [2]
    (line,) = ranks[0].stderr.splitlines()
    assert line.startswith("expand_vocab: error: ") and put(MISTAKES[name][1]) in line
    assert runs.files_of(tmp_path) == before
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(("out", "."))) == []


def test_force_replaces_an_earlier_call(pool: WorkerPool, fixtures: Fixtures, chinese: Path, tmp_path: Path) -> None:
    words = ["--tokenizer", fixtures.folder, "--add", chinese, "--out", tmp_path / "out"]
    must(pool, *words)
    first = runs.files_of(tmp_path / "out")
    must(pool, *words, "--force")
    assert runs.files_of(tmp_path / "out") == first


def kept_when_grown(folder: Path) -> tuple[int, int]:
    """Runs in a worker: what a model with zeros keeps, before and after."""
    old = replace(metadata.read(folder), padding=960)
    return old.kept, vocab_expansion._manifest(
        folder, old, vocab_expansion.NewTokens(old.model.vocab, ((1, 2),), "larger.model", "it")
    ).kept


def test_what_is_zero_in_a_pruned_model_stays_counted(pool: WorkerPool, teacher: Path) -> None:
    folder = run_directory.locate(str(teacher))
    assert pool.run(kept_when_grown, folder, world=1) == [(metadata.read(folder).kept - 960,) * 2]
