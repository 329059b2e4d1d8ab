"""The loader: every mistake in one sentence, with its place; and what is written reads back equal."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config import help, schema, track
from megatron_capgap.config.fields import table
from megatron_capgap.config.loader import STAGE_REQUIREMENTS, LoadedConfig, dump, load
from megatron_capgap.config.schema import STAGES, Config, DataConfig, Layout, ModelShape, StudentConfig, TeacherConfig
from megatron_capgap.config.training import OptimizerConfig, TrainConfig

GOOD = """\
run_dir: runs/distill
student:
  checkpoint: runs/small
  layout:
    tensor: 2
    sequence: true
teacher:
  checkpoint: runs/large
data:
  tokenizer: data/tokenizer.model
  train: [data/train]
  valid: [data/valid]
train:
  steps: 300
  global_batch: 32
optimizer:
  lr: 3e-4
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Loads a text as distill.yaml; gives the lines of the error as a list where there is one."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str, stage: str = "distill") -> LoadedConfig | list[str]:
        Path("distill.yaml").write_text(text, encoding="utf-8")
        try:
            return load("distill.yaml", overrides, stage)
        except ConfigError as error:
            assert str(error).splitlines() == error.problems
            return error.problems

    return read


def test_values_types_and_sources(read):
    loaded = read(GOOD, "--train.micro_batch=4", "--teacher.layout.tensor=2")
    config = loaded.config
    assert config.student == StudentConfig("runs/small", None, Layout(tensor=2, sequence=True))
    assert config.data.train == ("data/train",)
    assert config.optimizer.lr == 0.0003 and isinstance(config.optimizer.lr, float)
    assert config.train == TrainConfig(steps=300, global_batch=32, micro_batch=4)
    assert config.teacher == TeacherConfig("runs/large", Layout(tensor=2))
    assert loaded.sources["student.layout.tensor"] == "distill.yaml:5"
    assert loaded.sources["optimizer.lr"] == "distill.yaml:17"
    assert loaded.sources["train.micro_batch"] == "--train.micro_batch"
    assert loaded.sources["teacher.layout"] == "--teacher.layout.tensor"
    assert "optimizer.min_lr" not in loaded.sources and "seed" not in loaded.sources
    assert loaded.source("optimizer.min_lr") == "distill.yaml:16"
    assert loaded.source("seed") == "default"
    assert loaded.location("optimizer.min_lr") == "distill.yaml:16: optimizer.min_lr"
    assert (
        loaded.location("train.micro_batch") == "--train.micro_batch"
        and loaded.location("seed") == "seed (the default)"
    )


def test_overrides_win_and_the_last_one_most(read):
    loaded = read(GOOD, "--train.steps=5", "--train.steps=7", "--data.train=[a, b]", "--optimizer.lr=1e-3")
    assert (loaded.config.train.steps, loaded.config.data.train) == (7, ("a", "b"))
    assert loaded.config.optimizer.lr == 0.001


def test_an_override_of_a_section_replaces_it_and_its_sources(read):
    loaded = read(GOOD, "--student.layout={pipeline: 2}")
    assert loaded.config.student.layout == Layout(pipeline=2)
    assert "student.layout.tensor" not in loaded.sources
    assert loaded.sources["student.layout.pipeline"] == "--student.layout"


def test_an_override_can_remove_the_teacher(read):
    loaded = read(GOOD, "--teacher=null", stage="adapt")
    assert loaded.config.teacher is None and "teacher.checkpoint" not in loaded.sources


def test_anchors_and_merges(read):
    text = GOOD.replace("  layout:\n", "  layout: &cut\n")
    text = text.replace("runs/large\n", "runs/large\n  layout: {<<: *cut, sequence: false}\n")
    loaded = read(text)
    assert loaded.config.teacher.layout == Layout(tensor=2, sequence=False)
    assert loaded.sources["teacher.layout.sequence"] == "distill.yaml:9"


def test_an_alias_of_a_merged_mapping_says_nothing_twice(read):
    text = "runtime: &r {<<: {tensorboard: true}, tensorboard: false}\ncheckpoint: *r\n"
    (problem,) = read(GOOD + text)
    assert "checkpoint.tensorboard: unknown key" in problem


@pytest.mark.parametrize("value, expected", [("2.0", 2), ("1e3", 1000), ("1_000", 1000), ("010", 10), ("+7", 7)])
def test_whole_numbers_are_integers(read, value, expected):
    steps = read(GOOD, f"--train.steps={value}").config.train.steps
    assert steps == expected and isinstance(steps, int)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("--train.steps=2.5", "train.steps: 2.5 given; expected an integer > 0 or null"),
        ("--train.steps=true", "train.steps: true given; expected an integer > 0"),
        ("--train.steps='3'", 'train.steps: "3" given; expected an integer > 0'),
        ("--train.steps=0", "train.steps: 0 given; expected an integer > 0"),
        ("--train.steps=1:30", 'train.steps: "1:30" given; expected an integer > 0'),
        ("--train.eval_every=-1", "train.eval_every: -1 given; expected an integer >= 0"),
        ("--train.dropout=1", "train.dropout: 1 given; expected a number >= 0 and < 1"),
        ("--train.dropout=.nan", 'train.dropout: ".nan" given; expected a number >= 0 and < 1'),
        ("--optimizer.lr=true", "optimizer.lr: true given; expected a number > 0"),
        ("--optimizer.lr=1e999", "optimizer.lr: Infinity given; expected a number > 0"),
        (
            "--optimizer.warmup_fraction=1e999",
            "optimizer.warmup_fraction: Infinity given; expected a number >= 0 and <= 1",
        ),
        ("--optimizer.lr=fast", 'optimizer.lr: "fast" given; expected a number > 0'),
        ("--optimizer.betas=[0.9]", "optimizer.betas: [0.9] given; expected a list of 2"),
        ("--optimizer.betas=[0.9, 0.95, 0.99]", "optimizer.betas: [0.9, 0.95, 0.99] given; expected a list of 2"),
        (
            "--optimizer.schedule=cosin",
            'optimizer.schedule: "cosin" given; did you mean cosine? expected one of cosine, ',
        ),
        ("--device=off", 'device: "off" given; expected one of auto, cpu, cuda'),
        ("--student.layout.sequence=yes", 'student.layout.sequence: "yes" given; expected true or false'),
        ("--student.layout.sequence=1", "student.layout.sequence: 1 given; expected true or false"),
        ("--student.layout=2", "student.layout: 2 given; keys: tensor, pipeline, "),
        ("--checkpoint=", "checkpoint: null given; keys: every, keep, async_save; expected a section"),
        ("--data.tokenizer=5", "data.tokenizer: 5 given; quote it; expected a string"),
        ("--data.train=data/train", 'data.train: "data/train" given; expected a list, each entry a string'),
        ("--data.train=[a, 7]", "data.train: 7 given; expected a list, each entry a string"),
        ("--data.train=[a", "not YAML: "),
        (
            "--objective.matching=[{student_layer: 1}]",
            "matching.0.teacher_layer: missing; expected an integer > 0: Teacher",
        ),
        (
            "--objective.matching=[{student_layer: 1, teacher_layer: 1}, {student_layer: 0, teacher_layer: 1}]",
            "--objective.matching: objective.matching.1.student_layer: 0 given; expected an integer > 0",
        ),
        (
            "--objective.matching=[{student_layer: 1, teacher_layer: 2, kind: cosin}]",
            'objective.matching.0.kind: "cosin" given; did you mean cosine? expected one of mse, cosine',
        ),
        (
            "--objective.matching=[{student_layer: 1, teacher_layr: 2, teacher_layer: 2}]",
            "objective.matching.0.teacher_layr: unknown key; did you mean objective.matching.0.teacher_layer?",
        ),
        ("--objective.matching=[[1, 2]]", "objective.matching: [1, 2] given; keys: student_layer, teacher_layer, kind"),
        ("--run_dir.sub=1", "run_dir.sub: run_dir is 'runs/distill' (distill.yaml:1), not a section"),
        ("--seed", "no value given; use --seed=VALUE"),
        (
            "--data.tokenizer=!!python/name:os.system x",
            "the tag tag:yaml.org,2002:python/name:os.system is not supported",
        ),
        (
            "--teacher=null",
            "teacher: required by distill; expected a section: The model that the student is distilled from",
        ),
        ("--train.steps=null", "train.steps: required by distill; expected an integer > 0: Optimizer steps"),
        ("--data.train=[]", "data.train: required by distill; expected a list, each entry a string: Training"),
        ("--student.checkpoint=null", "student: neither of checkpoint and model set; set exactly one"),
        (
            "--student.model={layers: 1, hidden: 8, heads: 1, ffn: 8, vocab: 9}",
            "student: both of checkpoint and model",
        ),
    ],
)
def test_one_wrong_value_is_one_sentence(read, override, expected):
    (problem,) = read(GOOD, override)
    assert expected in problem
    assert problem.startswith(("--", "distill.yaml:"))


@pytest.mark.parametrize("stage", ["adapt", "evaluate"])
def test_a_stage_without_a_teacher_refuses_one(read, stage):
    assert read(GOOD, stage=stage) == [f"distill.yaml:7: teacher: {stage} has no teacher; remove the section"]


def test_needs_of_evaluate(read):
    (problem,) = read(GOOD, "--teacher=null", "--data.valid=[]", stage="evaluate")
    assert problem.startswith("--data.valid: required by evaluate; expected a list")


def test_needs_of_finetune(read):
    assert isinstance(read(GOOD, "--train.steps=null", stage="finetune"), LoadedConfig)
    assert isinstance(read(GOOD, "--teacher=null", "--finetune={}", stage="finetune"), LoadedConfig)
    (problem,) = read(GOOD, "--student.checkpoint=null", stage="finetune")
    assert problem.startswith("--student.checkpoint: required by finetune; expected a string: Source of the weights")
    (problem,) = read(GOOD, "--finetune.epochs=0", stage="finetune")
    assert problem == "--finetune.epochs: 0 given; expected an integer > 0"
    assert read(GOOD, "--finetune={}") == ["--finetune: distill reads no conversations; remove the section"]


def test_every_stage_has_its_needs():
    assert tuple(STAGE_REQUIREMENTS) == STAGES == tuple(help.STAGES)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("studnet: {}", "studnet: unknown key; did you mean student?"),
        (
            "seed: 1\nlayers: 3",
            "layers: unknown key in the top level; "
            "did you mean student.model.layers or student.recompute.layers or teacher.model.layers or prune.layers?",
        ),
        (
            "colour: red",
            "colour: unknown key; valid keys of the top level: run_dir, student, data, seed, device, teacher",
        ),
        (
            "train.steps: 3",
            "train.steps: dotted keys are allowed on the command line only; in a file, nest",
        ),
        ("1: 2", "1: unknown key; valid keys of the top level:"),
        ("? [a, b]\n: 2", ": a key must be a scalar"),
        ("device: cpu\ndevice: cpu", "device: duplicate key, first set at distill.yaml:18; keep one of them"),
        ("runtime: &r {tensorboard: *r}", "runtime.tensorboard: the anchor contains itself"),
        ("runtime: !thing {}", "runtime: the tag !thing is not supported; remove it"),
        ("<<: 3", ": cannot merge: expected a mapping or list of mappings for merging"),
    ],
)
def test_wrong_keys_of_the_file(read, line, expected):
    problems = read(GOOD + line)
    assert any(expected in problem for problem in problems), problems
    assert all(problem.startswith("distill.yaml:") for problem in problems)


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(read):
    (problem,) = read(GOOD, "--student.layers=3")
    assert problem.endswith(
        "student.layers: unknown key in student; "
        "did you mean student.model.layers or student.recompute.layers or teacher.model.layers or prune.layers?"
    )
    (problem,) = read(GOOD, "--optimizer.tensor=3")
    assert problem.endswith("did you mean student.layout.tensor or teacher.layout.tensor?")


def test_a_missing_key_is_explained(read):
    assert read("student: {checkpoint: a}\ndata: {valid: [a]}", stage="evaluate") == [
        "distill.yaml: run_dir: missing; expected a string: " + table()["run_dir"].doc,
        "distill.yaml:2: data.tokenizer: missing; expected a string: " + table()["data.tokenizer"].doc,
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "distill.yaml: the file is empty or not a mapping"),
        ("- a\n- b", "distill.yaml: the file is empty or not a mapping"),
        (
            "run_dir: a\ntrain: {steps: 1\n",
            "distill.yaml:3: not YAML: expected ',' or '}', but got '<stream end>'",
        ),
        ("run_dir: a\n\tseed: 1\n", "distill.yaml:2: not YAML: "),
        ("run_dir: a\n---\nrun_dir: b\n", "distill.yaml:2: not YAML: "),
        ("run_dir: a\nseed: \x07\n", "distill.yaml:2: not YAML: the character '\\x07' is not allowed"),
        ("run_dir: *nobody\n", "distill.yaml:1: not YAML: found undefined alias"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(read, text, expected):
    (problem,) = read(text)
    assert problem.startswith(expected)


def test_a_path_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: \xff\n")
    for name, reason in (("none.yaml", "No such file"), (".", "Is a directory"), ("latin.yaml", "not UTF-8")):
        with pytest.raises(ConfigError, match=f"cannot read the configuration: {reason}") as caught:
            load(str(tmp_path / name), (), "adapt")
        assert len(caught.value.problems) == 1


def test_all_mistakes_at_once_in_the_order_of_the_file(read):
    text = GOOD.replace("tensor: 2", "tenosr: 2").replace("steps: 300", "steps: many\n  micro_batch: 0")
    problems = read(text.replace("lr: 3e-4", "lr: -1").replace("run_dir", "rundir"), "--seed=-1", "--device=gpu")
    assert [problem.split(": ")[:2] for problem in problems] == [
        ["distill.yaml", "run_dir"],
        ["distill.yaml:1", "rundir"],
        ["distill.yaml:5", "student.layout.tenosr"],
        ["distill.yaml:14", "train.steps"],
        ["distill.yaml:15", "train.micro_batch"],
        ["distill.yaml:18", "optimizer.lr"],
        ["--seed", "-1 given; expected an integer >= 0 and < 9.22337e+18"],
        ["--device", '"gpu" given; did you mean cpu? expected one of auto, cpu, cuda'],
    ]


def misspellings(word: str) -> set[str]:
    """Every deletion of one letter and every swap of two neighbours."""
    deleted = {word[:i] + word[i + 1 :] for i in range(len(word))}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    return (deleted | swapped) - {word, ""}


def test_nearly_every_misspelt_key_is_answered_with_the_right_one(read):
    right = wrong = 0
    for key in filter(None, table()):
        *sections, word = key.split(".")
        typos = sorted(misspellings(word) - set(table()[".".join(sections)].children))
        opening = [f"{' ' * depth}{section}:" for depth, section in enumerate(sections)]
        if table()[".".join(sections)].type.startswith("a list"):
            sections.append("0")
            opening.append(f"{' ' * len(sections)}-")
        problems = read("\n".join([*opening, *(f"{' ' * (len(sections) + 1)}{typo}: 1" for typo in typos)]))
        for line, typo in enumerate(typos, start=len(sections) + 1):
            start = f"distill.yaml:{line}: {'.'.join([*sections, typo])}: unknown key"
            (answer,) = (problem for problem in problems if problem.startswith(start))
            hit = answer.endswith(f"did you mean {'.'.join([*sections, word])}?")
            right, wrong = right + hit, wrong + (not hit)
    assert right + wrong > 700
    assert right / (right + wrong) >= 0.95, (right, wrong)


def test_the_table_has_every_field_of_the_schema():
    classes = [c for c in (vars(schema) | vars(track)).values() if isinstance(c, type) and is_dataclass(c)]
    named = {field.name for c in classes for field in fields(c)}
    assert named == {key.rpartition(".")[2] for key in table() if key}
    assert all(key.doc for key in table().values() if key.name)


# What a field may hold, by what the schema says of it; drawn for the round trip.
texts = st.text(min_size=1, max_size=12)
counts = st.integers(1, 2**63)
rates = st.floats(1e-300, 1e300)
shares = st.floats(0, 1, exclude_max=True)
layouts = st.builds(
    Layout, tensor=counts, pipeline=counts, virtual_pipeline=counts, context=counts, sequence=st.booleans()
)
shapes = st.builds(
    ModelShape,
    layers=counts,
    hidden=counts,
    heads=counts,
    ffn=counts,
    vocab=counts,
    kv_heads=st.none() | counts,
    rope_theta=rates,
    tied_embeddings=st.booleans(),
)
configs = st.builds(
    Config,
    run_dir=texts,
    student=st.builds(StudentConfig, checkpoint=texts, layout=layouts)
    | st.builds(StudentConfig, model=shapes, layout=layouts),
    data=st.builds(
        DataConfig,
        tokenizer=st.sampled_from(["3e-4", "no", "null", "010", "1_000", "~", "<<", "2020-01-01", "a: b", "'", ""]),
        train=st.lists(texts, min_size=1, max_size=3).map(tuple),
        train_weights=st.none() | st.lists(rates, max_size=3).map(tuple),
    ),
    seed=counts,
    teacher=st.builds(TeacherConfig, checkpoint=texts, layout=st.none() | layouts, micro_batch=st.none() | counts),
    train=st.builds(TrainConfig, steps=counts, global_batch=st.none() | counts, dropout=st.floats(0, 0.99)),
    optimizer=st.builds(OptimizerConfig, lr=rates, betas=st.tuples(shares, shares)),
    objective=st.builds(
        schema.ObjectiveConfig,
        divergence=st.sampled_from(schema.DIVERGENCES),
        temperature=rates,
        matching=st.lists(st.builds(schema.LayerPair, counts, counts, weight=rates), max_size=2).map(tuple),
    ),
)


@settings(max_examples=60, deadline=None)
@given(config=configs)
def test_what_dump_writes_load_reads_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    dump(config, str(path))
    loaded = load(str(path), (), "distill")
    assert loaded.config == config
    assert repr(loaded.config) == repr(config)  # 1 == 1.0 == True, but their words differ
    sources = {re.sub(r"\.\d+", "", key) for key in loaded.sources}  # without the numbers of list entries
    assert list(loaded.sources)[:1] == ["run_dir"] and sources <= set(table())


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab: -[]{},&*!#|>'\"%@`\n\t\\?<=~.0123e+_\x07\u2028", max_size=60))
def test_any_text_is_refused_in_printable_lines(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(str(path), (f"--{text}", f"--train.steps={text}"), "adapt")
    assert all(problem.isprintable() for problem in caught.value.problems)


def test_dump_replaces_at_once(read, tmp_path, monkeypatch):
    config = read(GOOD).config
    target = tmp_path / "resolved.yaml"
    target.write_text("before")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dump(config, str(target))
    assert target.read_text() == "before"
    dump(config, str(target))
    assert [line.split(":")[0] for line in target.read_text().splitlines() if line[0] not in " -"] == [
        field.name for field in fields(Config)
    ]


def test_help_and_load_import_nothing_heavy(tmp_path):
    (tmp_path / "distill.yaml").write_text(GOOD)
    program = (
        "import json, sys; from megatron_capgap.config import help, loader\n"
        "from megatron_capgap.config.validation import checks\n"
        "help.stage_help('distill'); loader.load('distill.yaml', (), 'distill')\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(schema.__file__).parents[2])}
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert not {"torch", "megatron", "numpy", "transformers"} & set(json.loads(out.stdout))
