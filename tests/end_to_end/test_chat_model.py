"""A chat model from its conversations to transformers: it is served the ids that it was trained on, and it stops."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_capgap.data.chat_template import open_template
from megatron_capgap.data.conversation_files import read_conversations
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import runs, tokenizer_zoo
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures
from tests.unit.test_chat_zoo import CHATML, MISTRAL
from tools import convert_hf, generate

TALK = [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "The answer: not yet."}]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tokenizer_zoo.build(tmp_path_factory.mktemp("zoo"))


def finetuned(
    pool: WorkerPool, fixtures: Fixtures, folder: Path, tokenizer: Path, template: str, **changes: Any
) -> Path:
    """A tiny model that knows one conversation by heart."""
    talk = folder / "talk.jsonl"
    talk.write_text((json.dumps({"messages": TALK}) + "\n") * 4)
    base = {"data__tokenizer": str(tokenizer), "data__valid": None, "train__steps": 1}
    base["student__model__vocab"] = open_tokenizer(str(tokenizer)).vocab_size
    runs.train(pool, "adapt", runs.adapt_config(fixtures, folder / "base", **base))
    changes = {
        "student__model": None,
        "student__checkpoint": str(folder / "base"),
        "data__tokenizer": str(tokenizer),
        "data__train": [str(talk)],
        "data__valid": None,
        "data__sequence_length": 64,
        "finetune": {"template": template, "packed": False},
        "train__steps": 80,
        "train__global_batch": 4,
        "train__micro_batch": 4,
        "train__eval_batches": None,
        "optimizer__lr": 1.0e-2,
        "optimizer__schedule": "constant",
        **changes,
    }
    return runs.train(pool, "finetune", runs.adapt_config(fixtures, folder / "run", **changes))


def continued(pool: WorkerPool, run_dir: Path, tokenizer: Path, template: str) -> str:
    """What tools/generate.py says to the question."""
    prompts, out = run_dir.with_name("prompts.jsonl"), run_dir.with_name("answers.jsonl")
    prompts.write_text(json.dumps({"messages": TALK[:1]}) + "\n")
    words = ["--checkpoint", str(run_dir), "--tokenizer", str(tokenizer), "--prompts", str(prompts), "--out", str(out)]
    words += ["--template", template, "--max-new-tokens", "40", "--device", "cpu"]
    (rank,) = pool.run(generate.main, words, world=1, initialise=False, capture=True)
    assert rank.value == 0, rank
    return json.loads(out.read_text())["text"]


@pytest.mark.parametrize(
    "kind, template",
    [
        ("model file", None),
        ("sentencepiece_llama_listed", None),
        ("added_tokens_json", CHATML),
        ("metaspace_never", MISTRAL),
    ],
)
def test_a_chat_model_is_served_what_it_was_trained_on_and_stops(
    pool: WorkerPool, fixtures: Fixtures, zoo: dict[str, Path], tmp_path: Path, kind: str, template: str | None
) -> None:
    tokenizer = tmp_path / "tokenizer"
    if kind == "model file":
        tokenizer = shutil.copy(zoo["sentencepiece"] / "tokenizer.model", tmp_path / "own.model")
    else:
        shutil.copytree(zoo[kind], tokenizer)
    if template is not None:
        (tokenizer / "chat_template.jinja").write_text(template)
    name = "default" if template is None else "tokenizer"
    run_dir = finetuned(pool, fixtures, tmp_path, tokenizer, name)
    opened = open_tokenizer(str(tokenizer))
    written = open_template(name, opened, str(tokenizer))
    (conversation, *_) = read_conversations(str(tmp_path / "talk.jsonl"))
    trained = [token for segment in written.encode(conversation) for token in segment.tokens]
    assert continued(pool, run_dir, tokenizer, name).strip() == TALK[1]["content"]

    hf = tmp_path / "hf"
    words = ["export", "--checkpoint", str(run_dir), "--out", str(hf)]
    assert pool.run(convert_hf.main, words, world=1, initialise=False, capture=True)[0].value == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, model = AutoTokenizer.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(hf)
    assert theirs.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"] == trained
    asked = theirs.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=40, do_sample=False)[0].tolist()
    stops = written.end_of_turn_ids() | opened.stops
    assert said[-1] in stops and said == trained[: len(said)], theirs.decode(said)
    for file in ("config.json", "generation_config.json"):
        found = json.loads((hf / file).read_text())["eos_token_id"]
        assert set(found if isinstance(found, list) else [found]) == stops


def test_an_instruct_tokenizer_and_a_base_one_are_one(
    pool: WorkerPool, fixtures: Fixtures, zoo: dict[str, Path], tmp_path: Path
) -> None:
    """Byte-identical tokenizer.json, another eos: the commonest pair of teacher and student."""
    for name, eos in (("base", "</s>"), ("instruct", "<unk>")):
        shutil.copytree(zoo["prepend"], tmp_path / name)
        settings = {**tokenizer_zoo.FAST, "eos_token": eos}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    vocab = open_tokenizer(str(tmp_path / "base")).vocab_size
    changes = {"student__model__vocab": vocab, "train__steps": 1, "data__valid": None}
    teacher = runs.adapt_config(fixtures, tmp_path / "teacher", **changes, data__tokenizer=str(tmp_path / "instruct"))
    runs.train(pool, "adapt", teacher)
    student = runs.distill_config(
        fixtures, tmp_path / "run", tmp_path / "teacher", **changes, data__tokenizer=str(tmp_path / "base")
    )
    (rank,) = runs.run_stage(pool, "distill", student)
    assert rank.value == 0, rank
    said = " ".join((rank.stdout + rank.stderr).split())
    assert "teacher.checkpoint: its tokenizer had bos 1 and eos 0, data.tokenizer" in said
    assert "has bos 1 and eos 2; their pieces are the same" in said


def test_a_tokenizer_with_a_token_more_than_the_model_has_rows(
    pool: WorkerPool, fixtures: Fixtures, zoo: dict[str, Path], tmp_path: Path
) -> None:
    vocab = open_tokenizer(str(zoo["prepend"])).vocab_size
    changes = {"train__steps": 1, "data__tokenizer": str(zoo["prepend"]), "student__model__vocab": vocab}
    base = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "base", **changes))
    hf = tmp_path / "hf"
    words = ["export", "--checkpoint", str(base), "--out", str(hf)]
    assert pool.run(convert_hf.main, words, world=1, initialise=False) == [0]
    shutil.copy(zoo["pad"] / "tokenizer_config.json", hf / "tokenizer_config.json")  # a [PAD] behind the last row
    words = ["import", "--hf", str(hf), "--out", str(tmp_path / "imported")]
    assert pool.run(convert_hf.main, words, world=1, initialise=False) == [0]
    changes = {"student__model": None, "student__checkpoint": str(tmp_path / "imported"), "data__tokenizer": str(hf)}
    for stage in ("adapt", "evaluate"):
        config = runs.adapt_config(fixtures, tmp_path / stage, **changes, train__steps=1)
        (rank,) = runs.run_stage(pool, stage, config)
        assert rank.value == 0, rank
        said = " ".join((rank.stdout + rank.stderr).split())
        assert f"1 of the tokens of {hf} have no row in the model's vocab of {vocab} ('[PAD]')" in said
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "[PAD]"}, TALK[1]]}) + "\n")
    config = runs.adapt_config(fixtures, tmp_path / "finetuned", **changes, train__steps=1)
    config |= {"finetune": {"template": "default"}, "data": {**config["data"], "train": [str(talk)], "valid": None}}
    (rank,) = runs.run_stage(pool, "finetune", runs.changed(config, data__valid=None))
    assert rank.value == 2
    assert f"contain the token '[PAD]' ({vocab}), which has no row in the model's vocab of {vocab}" in rank.stderr
