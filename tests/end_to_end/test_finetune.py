"""Finetuning as a user meets it: epochs, early stopping, going on, bad input, evaluation, the template that travels."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.cli import main
from megatron_capgap.data.chat_template import DefaultTemplate
from megatron_capgap.data.messages import Conversation, Message
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import corpus, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures
from tools import convert_hf

TP2_PP2 = {"tensor": 2, "pipeline": 2, "sequence": True}


def test_epochs_read_every_conversation_as_often(
    pool: WorkerPool, fixtures: Fixtures, student: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": None, "finetune__epochs": 2, "finetune__packed": False, "train__global_batch": 6}
    config = runs.finetune_config(fixtures, tmp_path / "run", student, **changes)
    (rank,) = runs.run_stage(pool, "finetune", config)
    assert rank.value == 0 and "8 steps (finetune.epochs 2" in rank.stdout  # 24 conversations in rows of their own
    steps = runs.steps_of(tmp_path / "run")
    assert len(steps) == 8
    learned = [sum(step["tokens"] for step in steps[first : first + 4]) for first in (0, 4)]
    assert learned[0] == learned[1] > 0
    assert [step["tokens"] for step in steps[:4]] != [step["tokens"] for step in steps[4:]], "another order"
    assert (tmp_path / "run" / "latest").read_text() == "step_8\n"


@pytest.mark.parametrize(
    "layout, world",
    [({}, 1), pytest.param(TP2_PP2, 4, marks=pytest.mark.slow("four ranks train twice"))],
    ids=["one", "tp2_pp2"],
)
def test_a_run_goes_on_to_the_last_digit(
    pool: WorkerPool, fixtures: Fixtures, student: Path, teacher: Path, tmp_path: Path, layout: Any, world: int
) -> None:
    changes = {"finetune__neftune_alpha": 5.0, "train__dropout": 0.1, "student__layout": layout, "train__steps": 6}
    changes |= {"checkpoint__every": 2, "train__eval_every": 3, "checkpoint__keep": 9}
    config = runs.taught(runs.finetune_config(fixtures, tmp_path / "run", student, **changes), teacher)
    unbroken = runs.metrics(runs.train(pool, "finetune", config, world))
    again = runs.rewind(tmp_path / "run", tmp_path / "again", step=2)
    runs.train(pool, "finetune", {**config, "run_dir": str(again)}, world)
    assert runs.metrics(again) == unbroken
    assert [entry["step"] for entry in unbroken] == [1, 2, 3, 3, 4, 5, 6, 6]


def overfitting(fixtures: Fixtures, run_dir: Path, student: Path, **changes: Any) -> dict[str, Any]:
    """A run whose held-out loss soon rises: large steps on few conversations."""
    changes = {
        "train__steps": None,
        "finetune__epochs": 40,
        "finetune__patience": 2,
        "optimizer__lr": 3.0e-2,
        **changes,
    }
    changes |= {"train__eval_every": 2, "optimizer__schedule": "constant", "checkpoint__keep": 1}
    changes["train__global_batch"] = 4
    return runs.finetune_config(fixtures, run_dir, student, **changes)


@pytest.mark.parametrize(
    "layout, world",
    [({}, 1), pytest.param(TP2_PP2, 4, marks=pytest.mark.slow("four ranks train until they overfit"))],
    ids=["one", "tp2_pp2"],
)
def test_early_stopping_keeps_the_best_checkpoint(
    pool: WorkerPool, fixtures: Fixtures, student: Path, tmp_path: Path, layout: Any, world: int
) -> None:
    run_dir = tmp_path / "run"
    config = overfitting(fixtures, run_dir, student, student__layout=layout)
    ranks = runs.run_stage(pool, "finetune", config, world)
    assert [rank.value for rank in ranks] == [0] * world, ranks
    seen = {entry["step"]: entry["valid_loss"] for entry in runs.metrics(run_dir) if "valid_loss" in entry}
    best, last = min(seen, key=seen.__getitem__), max(seen)
    assert last == best + 4 == len(runs.steps_of(run_dir)), "two evaluations, two steps apart"
    assert f"finished: early, after step {last} of" in ranks[0].stdout
    assert f"checkpoint {run_dir}/checkpoints/step_{best};" in ranks[0].stdout
    assert runs.checkpoints(run_dir) == sorted([f"step_{best}", f"step_{last}"])
    assert (run_dir / "latest").read_text() == f"step_{last}\n"
    assert metadata.read(run_directory.locate(str(run_dir))).step == best
    before = runs.files_of(run_dir)
    ranks = runs.run_stage(pool, "finetune", config, world)
    assert [rank.value for rank in ranks] == [0] * world
    assert f"nothing to do: all {last} steps are done; the held-out loss has not fallen below" in ranks[0].stdout
    assert runs.files_of(run_dir) == before


def test_a_run_that_was_stopped_before_remembers_its_best(
    pool: WorkerPool, fixtures: Fixtures, student: Path, tmp_path: Path
) -> None:
    config = overfitting(fixtures, tmp_path / "run", student)
    config["checkpoint"] = {"every": 1, "keep": 99}
    whole = runs.train(pool, "finetune", config)
    best = int((whole / "best").read_text().strip().removeprefix("step_"))
    # The run died before, or after, it could say which one is the best; or what it said got damaged.
    damages = {best - 1: None, best: b"", best + 1: f"step_{best + 64}\n".encode(), best + 3: b"\xff\xfe"}
    for step, damage in damages.items():
        again = runs.rewind(whole, tmp_path / f"from_{step}", step)
        (again / "best").unlink()
        if damage is not None:
            (again / "best").write_bytes(damage)
        if step > best:
            _copy_checkpoint(whole, again, best)
        runs.train(pool, "finetune", {**config, "run_dir": str(again), "checkpoint": {"every": 1, "keep": 1}})
        assert runs.metrics(again) == runs.metrics(whole), step
        assert (again / "best").read_text() == f"step_{best}\n", step
        assert f"step_{best}" in runs.checkpoints(again), step


def _copy_checkpoint(source: Path, target: Path, step: int) -> None:
    import shutil

    shutil.copytree(source / "checkpoints" / f"step_{step}", target / "checkpoints" / f"step_{step}")


def test_the_held_out_conversations_can_be_evaluated_alone(
    pool: WorkerPool, fixtures: Fixtures, student: Path, tmp_path: Path
) -> None:
    run_dir = runs.train(pool, "finetune", runs.finetune_config(fixtures, tmp_path / "run", student))
    last = runs.metrics(run_dir)[-1]
    for name, world, changes in (("packed", 1, {}), ("alone", 2, {"finetune__packed": False})):
        config = runs.finetune_config(fixtures, tmp_path / name, run_dir, train__steps=None, **changes)
        runs.train(pool, "evaluate", config, world)
        found = json.loads((tmp_path / name / "evaluation.json").read_text())
        numbers = ("step", "valid_loss", "valid_perplexity", "bits_per_byte", "valid_tokens")
        runs.assert_close({n: found[n] for n in numbers}, {n: last[n] for n in numbers}, 1e-5, name)


def test_check_tells_without_reading_conversations(
    fixtures: Fixtures, student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"train__steps": None, "train__global_batch": 16}
    config = runs.taught(runs.finetune_config(fixtures, tmp_path / "run", student, **changes), teacher)
    assert main(["finetune", "--config", runs.write_config(config), "--check-world", "4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("finetune: the configuration is valid")
    assert "run: 3 epochs of data.train, whose length determines the number of steps\n" in text
    assert "capacity gap T/S: " in text and "teacher hidden states per global batch: " in text
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Mistake:
    """One kind of bad input."""

    says: tuple[str, ...]
    """What the error line must hold. FOLDER stands for the test's own folder."""
    changes: dict[str, Any] = field(default_factory=dict)
    lines: list[Any] | None = None
    """What chat_train.jsonl holds in place of conversations."""
    spoil: Callable[[Path], object] = lambda folder: None
    taught: bool = False


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


GOOD = talk(("user", "ka"), ("assistant", "lo"))
MISTAKES = {
    "role missing": Mistake(
        ("FOLDER/chat_train.jsonl:2: message 1: its role is missing; valid values: ai, assistant, bard",),
        lines=[GOOD, {"messages": [{"content": "ka"}]}],
    ),
    "empty turn": Mistake(
        ("FOLDER/chat_train.jsonl:2: message 2: the assistant's text is empty; remove the line",),
        lines=[GOOD, talk(("user", "ka"), ("assistant", " "))],
    ),
    "no answer": Mistake(
        ("FOLDER/chat_train.jsonl:1: does not end with an assistant message",), lines=[talk(("user", "ka"))]
    ),
    "missing file": Mistake(
        (": data.train: FOLDER/chat_trian.jsonl: no such file; give a jsonl file",),
        {"data__train": ["FOLDER/chat_trian.jsonl"]},
    ),
    "a dataset's prefix": Mistake(
        ("FOLDER/corpus_train: no such file; give a jsonl file of conversations",),
        {"data__train": ["FOLDER/corpus_train"]},
    ),
    "unknown template": Mistake(
        ('finetune.template: "chatml" given;', "expected one of tokenizer, default"), {"finetune__template": "chatml"}
    ),
    "tokenizer without a template": Mistake(
        ("finetune.template: tokenizer: FOLDER/tokenizer.model has no chat template; use template default",),
        {"finetune__template": "tokenizer"},
    ),
    "no word of the assistant's": Mistake(
        ("data.sequence_length: 8 is too short: no conversation has assistant text within it",),
        {"data__sequence_length": 8},
    ),
    "no checkpoint": Mistake(
        ("student.checkpoint: required by finetune; expected a string: Source of the weights",),
        {"student__checkpoint": None},
    ),
    "a model in numbers": Mistake(
        ("student.checkpoint: required by finetune; expected a string",),
        {"student__checkpoint": None, "student__model": runs.STUDENT},
    ),
    "another vocabulary": Mistake(
        ("student.checkpoint: ", "was trained with tokenizer", "use the checkpoint's tokenizer"),
        {"data__tokenizer": "FOLDER/large.model"},
        spoil=lambda folder: corpus.save_sentencepiece(folder / "large.model", 400),
    ),
    "weights of files": Mistake(
        ("data.train_weights: finetune reads every conversation once per epoch",), {"data__train_weights": [1.0]}
    ),
    "patience without evaluations": Mistake(
        ("finetune.patience: 2 requires train.eval_every > 0, which is 0",), {"finetune__patience": 2}
    ),
    "an objective without a teacher": Mistake(
        ("objective.temperature: 2.0: finetune has no teacher, so this key has no effect",),
        {"objective__temperature": 2.0},
    ),
    "a teacher of its own ranks": Mistake(
        ("teacher.placement: disjoint: finetune does not support a disjoint teacher; valid value: colocated",),
        {"teacher__placement": "disjoint", "teacher__ranks": 1},
        taught=True,
    ),
    "a section of another stage": Mistake(
        ("prune: finetune does not prune; remove the section",), {"prune": {"layers": 2}}
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_line_and_exit_code_2(
    pool: WorkerPool, fixtures: Fixtures, student: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    mistake, world = MISTAKES[name], 2
    for file in fixtures.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if mistake.lines is not None:
        corpus.write_lines(tmp_path / "chat_train.jsonl", mistake.lines)
    mistake.spoil(tmp_path)
    config = runs.finetune_config(Fixtures(tmp_path), tmp_path / "run", student)
    config = runs.changed(runs.taught(config, teacher) if mistake.taught else config, **mistake.changes)
    config = json.loads(json.dumps(config).replace("FOLDER", str(tmp_path)))
    words = ["finetune", "--config", runs.write_config(config, tmp_path / "run.yaml")]
    before = runs.files_of(tmp_path)
    ranks = pool.run(main, words, world=world, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [2] * world, ranks
    (line,) = ranks[0].stderr.splitlines()
    assert line.startswith("capgap: error: ")
    for part in mistake.says:
        assert part.replace("FOLDER", str(tmp_path)) in line
    assert runs.files_of(tmp_path) == before


def test_another_template_does_not_go_on(pool: WorkerPool, fixtures: Fixtures, student: Path, tmp_path: Path) -> None:
    folder = corpus.save_sentencepiece_as_folder(tmp_path / "words", runs.VOCAB)
    (Path(folder) / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    changes = {"student__checkpoint": None, "data__tokenizer": folder}
    start = runs.adapt_config(fixtures, tmp_path / "start", train__steps=1, data__tokenizer=folder, data__valid=None)
    begun = runs.train(pool, "adapt", start)
    config = runs.finetune_config(fixtures, tmp_path / "run", begun, **{**changes, "student__checkpoint": str(begun)})
    runs.train(pool, "finetune", config)
    (rank,) = runs.run_stage(pool, "finetune", runs.changed(config, finetune__template="tokenizer", train__steps=9))
    assert rank.value == 2
    (line,) = rank.stderr.splitlines()
    assert (
        "finetune.template: " in line and "was started with another template; use it or choose another run_dir" in line
    )


@pytest.fixture(scope="module")
def finetuned(pool: WorkerPool, fixtures: Fixtures, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = runs.finetune_config(fixtures, tmp_path_factory.mktemp("finetuned") / "run", student, train__steps=1)
    return runs.train(pool, "finetune", config)


def export(pool: WorkerPool, run_dir: Path, out: Path) -> None:
    words = ["export", "--checkpoint", str(run_dir), "--out", str(out)]
    assert pool.run(convert_hf.main, words, world=1, initialise=False) == [0]


def test_the_default_template_is_exported_along(
    pool: WorkerPool, fixtures: Fixtures, finetuned: Path, tmp_path: Path
) -> None:
    export(pool, finetuned, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    said = [{"role": "system", "content": "mi lo"}, {"role": "user", "content": "ka lo mi"}]
    ours = DefaultTemplate(open_tokenizer(fixtures.data["tokenizer"]))
    (asked,) = ours.encode(Conversation(tuple(Message(message["role"], message["content"]) for message in said)))
    assert theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False) == list(asked.tokens)


def test_the_template_stays_with_the_model(
    pool: WorkerPool, fixtures: Fixtures, finetuned: Path, student: Path, tmp_path: Path
) -> None:
    config = runs.adapt_config(fixtures, tmp_path / "on", student__model=None, student__checkpoint=str(finetuned))
    further = runs.train(pool, "adapt", runs.changed(config, train__steps=1, data__valid=None))
    assert metadata.read(run_directory.locate(str(further))).chat_template == DefaultTemplate.jinja
    assert metadata.read(run_directory.locate(str(student))).chat_template is None
    export(pool, student, tmp_path / "plain")
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()


def test_a_tokenizer_s_own_template_is_used_and_exported(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    folder = Path(corpus.save_sentencepiece_as_folder(tmp_path / "words", runs.VOCAB))
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}" + template)
    start = runs.adapt_config(fixtures, tmp_path / "start", train__steps=1, data__valid=None)
    start["data"]["tokenizer"] = str(folder)
    begun = runs.train(pool, "adapt", start)
    config = runs.finetune_config(fixtures, tmp_path / "run", begun, finetune__template="tokenizer", train__steps=1)
    config["data"]["tokenizer"] = str(folder)
    run_dir = runs.train(pool, "finetune", config)
    both = {"default": template, "tool_use": "{{ tools }}" + template}
    assert metadata.read(run_directory.locate(str(run_dir))).chat_template == both
    export(pool, run_dir, tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == both
