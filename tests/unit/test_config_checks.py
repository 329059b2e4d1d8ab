"""Every cross-check: what is wrong, where it was said and what would do; and nothing about a right run."""

from pathlib import Path

import pytest
import yaml

from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config import derived
from megatron_capgap.config.loader import LoadedConfig, load
from megatron_capgap.config.schema import Config, DataConfig, Layout, ModelShape, StudentConfig, TeacherConfig
from megatron_capgap.config.training import TrainConfig
from megatron_capgap.config.validation import checks, track

STUDENT = ModelShape(layers=4, hidden=64, heads=8, kv_heads=4, ffn=160, vocab=1000)
TEACHER = ModelShape(layers=8, hidden=96, heads=8, kv_heads=4, ffn=256, vocab=1000)
BASE = {
    "run_dir": "runs/distill",
    "student": {
        "model": {"layers": 4, "hidden": 64, "heads": 8, "kv_heads": 4, "ffn": 160, "vocab": 1000},
        "layout": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 1, "context": 1, "sequence": True},
    },
    "teacher": {"checkpoint": "runs/large"},
    "data": {"tokenizer": "tokenizer.model", "train": ["a", "b"], "valid": ["c"], "sequence_length": 32},
    "train": {"steps": 10, "global_batch": 16, "micro_batch": 2},
    "optimizer": {"lr": 1.0e-3},
    "objective": {"temperature": 2.0},
}


@pytest.fixture
def problems_of(tmp_path, monkeypatch):
    """Runs all checks on BASE with overrides; gives the problems, none of them empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track, "_is_installed", lambda package: False)
    Path("distill.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))

    def problems_of(
        *overrides: str, world: int = 8, stage: str = "distill", student=None, teacher=TEACHER, capability=None
    ) -> list[str]:
        loaded = load("distill.yaml", overrides, stage)
        try:
            checks.check(loaded, stage, world, student or loaded.config.student.model, teacher, capability)
        except ConfigError as error:
            return error.problems
        return []

    return problems_of


FROM_CHECKPOINT = ("--student.model=null", "--student.checkpoint=runs/small")
NO_TEACHER = ("--teacher=null", "--objective=null", "--objective={}")

# overrides, keyword arguments -> the beginning of the one problem and words that it must hold
ONE_PROBLEM = [
    (
        ["--student.layout.pipeline=1"],
        {"world": 7},
        "distill.yaml:10: student.layout: tensor 2",
        [
            "= 2 does not divide the world size 7",
            "valid numbers of ranks: 6 or 8",
            "--nproc-per-node",
            "--check-world",
        ],
    ),
    (
        [],
        {"world": 1},
        "distill.yaml:10: student.layout: tensor 2 * pipeline 2 * context 1 = 4",
        ["world size 1; nearest valid numbers of ranks: 4"],
    ),
    (
        [
            "--student.model.heads=6",
            "--student.model.kv_heads=6",
            "--student.model.hidden=72",
            "--student.layout.tensor=4",
        ],
        {"world": 8},
        "--student.layout.tensor: 4 does not divide student.model.heads 6 and student.model.kv_heads 6;",
        ["valid values: 1 or 2"],
    ),
    (
        ["--student.model.ffn=161"],
        {},
        "distill.yaml:11: student.layout.tensor: 2 does not divide student.model.ffn 161;",
        ["; valid values: 1"],
    ),
    (
        ["--student.layout.tensor=4", *FROM_CHECKPOINT],
        {"student": ModelShape(4, 64, 8, 160, 1000, kv_heads=2)},
        "--student.layout.tensor: 4 does not divide kv_heads 2 of runs/small;",
        ["valid values: 1 or 2"],
    ),
    (
        [],
        {"teacher": ModelShape(8, 96, 8, 255, 1000)},
        "distill.yaml:11: student.layout.tensor: 2 does not divide ffn 255 of runs/large;",
        ["; valid values: 1"],
    ),
    (
        ["--student.model.kv_heads=6"],
        {},
        "--student.model.kv_heads: 6 does not divide heads 8;",
        ["valid values: 1, 2, 4 or 8"],
    ),
    (
        [],
        {"teacher": ModelShape(8, 96, 8, 256, 1000, kv_heads=6)},
        "distill.yaml:17: teacher.checkpoint: runs/large: kv_heads 6 does not divide heads 8;",
        [],
    ),
    (
        ["--student.model.hidden=68"],
        {},
        "--student.model.hidden: 68 is not divisible by heads 8;",
        ["valid values: 64 or 72, or set head_dim"],
    ),
    (
        ["--student.model.hidden=72"],
        {},
        "--student.model.hidden: 72 makes heads 9 wide",
        ["rotary", "head_dim: 8 or 10"],
    ),
    (
        ["--student.model.head_dim=7"],
        {},
        "--student.model.head_dim: 7 makes heads 7 wide",
        ["head_dim: 6 or 8"],
    ),
    (
        ["--student.model.layers=5"],
        {},
        "distill.yaml:12: student.layout.pipeline: 2 does not divide student.model.layers 5;",
        ["valid values: 1 or 5", "or set student.layout.stage_layers, for example to [3, 2]"],
    ),
    (
        ["--student.layout.stage_layers=[3, 2]"],
        {},
        "--student.layout.stage_layers: [3, 2] are 5 layers on 2 stage(s), not student.model.layers 4 on pipeline 2;",
        ["example [2, 2], or null"],
    ),
    (
        ["--student.layout.stage_layers=[2, 1, 1]"],
        {},
        "--student.layout.stage_layers: [2, 1, 1] are 4 layers on 3 stage(s), not student.model.layers 4 on pipeline",
        ["example [2, 2], or null"],
    ),
    (
        ["--student.layout.stage_layers=[3, 1]", "--student.layout.virtual_pipeline=2"],
        {},
        "--student.layout.stage_layers: [3, 1]: not with virtual_pipeline 2;",
        ["set it to null, or virtual_pipeline to 1"],
    ),
    (
        [],
        {"teacher": ModelShape(9, 96, 8, 256, 1000)},
        "distill.yaml:12: student.layout.pipeline: 2 does not divide layers 9 of runs/large;",
        ["1, 3 or 9"],
    ),
    (
        ["--student.layout.virtual_pipeline=3"],
        {},
        "--student.layout.virtual_pipeline: 3 * pipeline 2 does not divide",
        ["student.model.layers 4", "valid values: 1 or 2"],
    ),
    (
        ["--student.layout={virtual_pipeline: 2}"],
        {},
        "--student.layout: student.layout.virtual_pipeline: 2 requires pipeline > 1",
        ["set it to 1"],
    ),
    (
        ["--student.layout.virtual_pipeline=2", "--train.global_batch=12"],
        {},
        "--student.layout.virtual_pipeline: 2 requires that train.global_batch, now 12,",
        ["micro_batch 2 * data-parallel size 2 * pipeline 2 = 8;", "valid values of global_batch: 8 or 16"],
    ),
    (
        ["--student.layout.virtual_pipeline=2", "--train.global_batch=null"],
        {},
        "--student.layout.virtual_pipeline: 2 requires that train.global_batch, now 4,",
        ["valid values of global_batch: 8"],
    ),
    (
        ["--student.layout.tensor=1"],
        {},
        "distill.yaml:15: student.layout.sequence: true requires tensor > 1;",
        ["set it to false"],
    ),
    (
        ["--data.sequence_length=33"],
        {},
        "--data.sequence_length: 33 is not divisible by student.layout.tensor 2",
        ["valid values: 32 or 34"],
    ),
    (
        ["--student.layout.context=2", "--data.sequence_length=36"],
        {},
        "--data.sequence_length: 36 is not divisible by 2 * student.layout.context 2 * tensor 2 (sequence is true);",
        ["valid values: 32 or 40"],
    ),
    (
        [
            "--student.layout.context=2",
            "--student.model=null",
            "--objective=null",
            "--objective={}",
            "--prune={ffn: 160}",
        ],
        {"stage": "prune", "student": STUDENT},
        "--student.layout.context: 2: prune does not shard the sequence; set context: 1",
        [],
    ),
    (
        ["--train.global_batch=18"],
        {},
        "--train.global_batch: 18 is not a multiple of train.micro_batch 2 * data-parallel size 2 = 4;",
        ["valid values: 16 or 20"],
    ),
    (
        ["--train.global_batch=2"],
        {},
        "--train.global_batch: 2 is not a multiple",
        ["; nearest valid values: 4"],
    ),
    (
        ["--teacher.micro_batch=3"],
        {},
        "--teacher.micro_batch: 3 does not divide the 8 sequences",
        ["valid values: 1, 2, 4 or 8"],
    ),
    (
        ["--teacher.micro_batch=4", "--teacher.layout={tensor: 2}"],
        {"world": 16},
        "--teacher.micro_batch: 4 does not divide the 2 sequences that each of the teacher's data-parallel ranks has",
        ["of 16; valid values: 1 or 2"],
    ),
    (
        ["--teacher.layout={}", "--train.micro_batch=4"],
        {},
        "distill.yaml:16: teacher.micro_batch: null means train.micro_batch 4, which does not divide the 2 sequences",
        ["valid values: 1 or 2"],
    ),
    (
        ["--teacher.layout={}", "--student.layout={pipeline: 4}", "--train.global_batch=12"],
        {},
        "--train.global_batch: 12 is not divisible by the teacher's data-parallel size 8;",
        ["valid values: 8 or 16"],
    ),
    (
        ["--teacher.layout={tensor: 8, pipeline: 2}"],
        {"teacher": ModelShape(8, 96, 8, 256, 1000)},
        "--teacher.layout: tensor 8 * pipeline 2 * context 1 = 16 does not divide the world size 8;",
        ["valid numbers of ranks: 16"],
    ),
    (
        ["--teacher.ranks=4"],
        {},
        "--teacher.ranks: 4: a colocated teacher uses all ranks",
        ["remove the key, or set teacher.placement: disjoint"],
    ),
    (
        ["--teacher.ahead=2"],
        {},
        "--teacher.ahead: 2: a colocated teacher alternates",
        ["remove the key, or set teacher.placement: disjoint"],
    ),
    (
        ["--teacher.placement=disjoint"],
        {},
        "distill.yaml:16: teacher.ranks: null, but teacher.placement is disjoint;",
        ["below the world size 8"],
    ),
    (
        ["--teacher.placement=disjoint", "--teacher.ranks=8"],
        {},
        "--teacher.ranks: 8 leaves no rank for the student, the world size is 8;",
        ["use a smaller value"],
    ),
    (
        ["--teacher.placement=disjoint", "--teacher.ranks=4", "--teacher.layout={pipeline: 8}"],
        {},
        "--teacher.ranks: 4 is not divisible by the teacher's tensor 1 * pipeline 8 * context 1 = 8;",
        ["valid values: 8"],
    ),
    (
        ["--teacher.placement=disjoint", "--teacher.ranks=2", "--teacher.layout={pipeline: 2}"],
        {},
        "distill.yaml:10: student.layout: tensor 2 * pipeline 2 * context 1 = 4 does not divide the world size 8 "
        "- teacher.ranks 2;",
        ["valid numbers of ranks: 4 or 8"],
    ),
    (
        ["--teacher.layout={tensor: 2, pipeline: 2, sequence: true, virtual_pipeline: 2}"],
        {},
        "--teacher.layout: teacher.layout.virtual_pipeline: 2: the teacher runs forward only",
        ["valid value: 1"],
    ),
    (
        ["--optimizer.min_lr=0.01"],
        {},
        "--optimizer.min_lr: 0.01 is above optimizer.lr 0.001;",
        ["use at most 0.001"],
    ),
    (
        ["--data.train_weights=[1]"],
        {},
        "--data.train_weights: 1 weights for the 2 entries of data.train;",
        ["give 2 weights"],
    ),
    (
        ["--train.eval_every=5", "--data.valid=[]"],
        {},
        "--train.eval_every: 5 requires data.valid, which is empty;",
        ["set eval_every to 0"],
    ),
    (
        ["--student.model.family=gpt_neox"],
        {},
        "distill.yaml:7: student.model.kv_heads: 4 differs from heads 8, but gpt_neox has no grouped queries;",
        ["valid value: 8"],
    ),
    (
        ["--student.model.family=qwen2", "--student.model.head_dim=16"],
        {},
        "--student.model.head_dim: 16 * heads 8 is not hidden 64, as qwen2 requires;",
        ["remove the key"],
    ),
    (
        ["--student.model.family=gpt2", "--student.model.kv_heads=8"],
        {},
        "distill.yaml:3: student.model.max_positions: null, but gpt2 has an embedding for each position;",
        ["set it to the longest sequence"],
    ),
    (
        ["--student.model.rotary_share=0.5"],
        {},
        "--student.model.rotary_share: 0.5: llama does not use this key;",
        ["remove it"],
    ),
    (
        ["--student.model.family=gpt2", "--student.model.kv_heads=8", "--student.model.max_positions=24"],
        {},
        "distill.yaml:25: data.sequence_length: 32 is longer than student.model.max_positions 24;",
        ["use at most 24, or another model"],
    ),
    (
        [],
        {"teacher": ModelShape(8, 96, 8, 256, 1000, family="mistral", attention_window=16)},
        "distill.yaml:25: data.sequence_length: 32 is longer than attention_window 16 of runs/large;",
        [],
    ),
    (
        ["--objective.divergence_weight=0", "--objective.cross_entropy_weight=0"],
        {},
        "--objective.divergence_weight: 0, and so is cross_entropy_weight",
        ["set a weight > 0"],
    ),
    (
        ["--objective.matching=[{student_layer: 5, teacher_layer: 8}]"],
        {},
        "--objective.matching: objective.matching.0.student_layer: 5 is beyond student.model.layers 4;",
        ["valid values: 1 to 4"],
    ),
    (
        ["--objective.matching=[{student_layer: 4, teacher_layer: 8}, {student_layer: 1, teacher_layer: 9}]"],
        {},
        "--objective.matching: objective.matching.1.teacher_layer: 9 is beyond layers 8 of runs/large;",
        ["valid values: 1 to 8"],
    ),
    (
        [
            "--objective.matching="
            "[{student_layer: 4, teacher_layer: 8}, {student_layer: 4, teacher_layer: 8, weight: 2}]"
        ],
        {},
        "--objective.matching: objective.matching.1: student layer 4, teacher layer 8, mse is a duplicate;",
        ["the sum of their weights"],
    ),
    (
        ["--teacher=null", "--objective={matching: [{student_layer: 1, teacher_layer: 1}]}"],
        {"stage": "adapt", "teacher": None},
        "--objective: objective.matching: 1 pairs: adapt has no teacher",
        ["remove it"],
    ),
    (
        ["--teacher=null"],
        {"stage": "adapt", "teacher": None},
        "distill.yaml:33: objective.temperature: 2.0: adapt has no teacher",
        ["remove it"],
    ),
    (
        ["--student.precision.fp8.recipe=tensorwise", "--student.precision.engine=local"],
        {},
        "--student.precision.engine: local does not support FP8;",
        ["valid values: transformer_engine, auto"],
    ),
    (
        ["--student.precision.fp8.recipe=blockwise", "--student.precision.fp8.amax_history=16", "--student.layout={}"],
        {"teacher": ModelShape(8, 96, 8, 256, 1000)},
        "--student.precision.fp8.amax_history: 16: recipe blockwise keeps no history",
        ["remove it"],
    ),
    (
        ["--teacher.precision.fp8.recipe=delayed"],
        {},
        "--teacher.precision.fp8.recipe: delayed: its scales are updated in training only, and the teacher runs",
        ["valid values: tensorwise, blockwise"],
    ),
    (
        ["--student.precision.fp8.recipe=delayed", "--student.precision.fp8.first_last_layers_bf16=1"],
        {},
        "--student.precision.fp8.first_last_layers_bf16: 1: recipe delayed has one scaling context",
        ["set it to 0, or use another recipe"],
    ),
    (
        ["--student.precision.fp8.recipe=tensorwise", "--student.precision.fp8.first_last_layers_bf16=2"],
        {},
        "--student.precision.fp8.first_last_layers_bf16: 2 at each end leave none of the student.model.layers 4",
        ["use at most 1, or remove fp8"],
    ),
    (
        [
            "--student.precision.fp8.recipe=tensorwise",
            "--student.precision.fp8.first_last_layers_bf16=3",
            "--student.model.layers=8",
            "--student.layout.pipeline=4",
        ],
        {},
        "--student.precision.fp8.first_last_layers_bf16: 3 is more than the 2 layers of a pipeline stage",
        ["use at most 2"],
    ),
    (
        ["--student.precision.fp8.recipe=tensorwise", "--student.precision.fp8.param_gather=true"],
        {},
        "--student.precision.fp8.param_gather: true: Megatron's optimizer treats FP8 weights as bf16, but",
        ["student.precision.compute is fp32; set it to false, or use compute bf16"],
    ),
    (
        [
            "--student.precision={compute: bf16, fp8: {recipe: mxfp8, param_gather: true}}",
            "--student.model.ffn=128",
        ],
        {},
        "--student.precision: student.precision.fp8.param_gather: true: Megatron's all-gather buffers do not",
        ["set it to false, or use recipe blockwise"],
    ),
    (
        [
            "--teacher.precision={compute: bf16, fp8: {recipe: tensorwise, param_gather: true}}",
            "--teacher.offload=true",
        ],
        {},
        "--teacher.precision: teacher.precision.fp8.param_gather: true: teacher.offload supports bf16 and fp32 weights",
        ["set it to false, or set teacher.offload to false"],
    ),
    (
        ["--student.precision.fp8.recipe=tensorwise", "--student.model.ffn=176"],
        {},
        "--student.precision.fp8.recipe: tensorwise requires multiples of 16, but the student's fc2 has 88 inputs per",
        ["rank at tensor 2 (hidden 64, heads 8, ffn 176); nearest valid values: 80 or 96"],
    ),
    (
        ["--student.precision.fp8.recipe=delayed", "--data.sequence_length=24", "--student.layout={context: 2}"],
        {},
        "--student.precision.fp8.recipe: delayed requires a multiple of 16 tokens per rank; the student has 24 = micro",
        ["* sequence_length 24 / 2; nearest valid values: 16 or 32"],
    ),
    (
        ["--student.precision.fp8.recipe=blockwise", "--data.sequence_length=128"],
        {},
        "--student.precision.fp8.recipe: blockwise with sequence parallelism requires that 128 divides student.",
        ["hidden 64; nearest valid values: 128"],
    ),
    (
        ["--student.precision.fp8.recipe=mxfp8", "--data.sequence_length=36", "--student.model.ffn=192"],
        {},
        "--student.precision.fp8.recipe: mxfp8 requires a multiple of 32 tokens per rank; the student has 36 = micro",
        ["* sequence_length 36 / 2; nearest valid values: 32 or 64"],
    ),
    (
        ["--teacher.precision.fp8.recipe=mxfp8"],
        {"capability": (9, 0), "teacher": ModelShape(8, 128, 8, 256, 1000)},
        "--teacher.precision.fp8.recipe: mxfp8 needs compute capability 10.0 and below 12.0, the GPUs have 9.0;",
        ["valid values: delayed, tensorwise, blockwise"],
    ),
    (
        ["--teacher.precision.fp8.recipe=mxfp8"],
        {"capability": (12, 0), "teacher": ModelShape(8, 128, 8, 256, 1000)},
        "--teacher.precision.fp8.recipe: mxfp8 needs compute capability 10.0 and below 12.0, the GPUs have 12.0;",
        ["valid values: delayed, tensorwise, blockwise"],
    ),
    (
        ["--teacher.precision.fp8.recipe=tensorwise"],
        {"capability": (8, 0)},
        "--teacher.precision.fp8.recipe: tensorwise needs compute capability 8.9 or newer, the GPUs have 8.0;",
        ["these GPUs do not support FP8: remove fp8"],
    ),
    (
        [*FROM_CHECKPOINT, "--data.train_weights=[1, 3]"],
        {"stage": "finetune", "student": STUDENT},
        "--data.train_weights: finetune reads every conversation once per epoch",
        ["remove the key"],
    ),
    (
        [*FROM_CHECKPOINT, "--finetune.patience=2"],
        {"stage": "finetune", "student": STUDENT},
        "--finetune.patience: 2 requires train.eval_every > 0, which is 0;",
        ["set eval_every, or remove patience"],
    ),
    (
        [*FROM_CHECKPOINT, "--teacher.placement=disjoint", "--teacher.ranks=4"],
        {"stage": "finetune", "student": STUDENT},
        "--teacher.placement: disjoint: finetune does not support a disjoint teacher;",
        ["valid value: colocated"],
    ),
    (
        [*FROM_CHECKPOINT, "--teacher=null"],
        {"stage": "finetune", "student": STUDENT, "teacher": None},
        "distill.yaml:33: objective.temperature: 2.0: finetune has no teacher",
        ["remove it"],
    ),
    (
        ["--student.recompute.what=full", "--student.recompute.layers=3"],
        {},
        "--student.recompute.layers: 3 is more than the 2 layers of a model chunk;",
        ["valid values: 1 to 2, or null"],
    ),
    (
        ["--student.recompute.what=full", "--student.recompute.every=2", "--student.layout.virtual_pipeline=2"],
        {},
        "--student.recompute.every: 2 does not divide the 1 layers of a model chunk;",
        ["valid values: 1"],
    ),
    (
        ["--student.recompute.what=full", "--student.recompute.every=2", "--student.recompute.layers=2"],
        {},
        "--student.recompute.every: 2: with layers 2 each layer is recomputed from its own input;",
        ["remove one of the two keys"],
    ),
    (
        ["--student.recompute.what=mlp", "--student.recompute.layers=1"],
        {},
        "--student.recompute.layers: 1: what: mlp recomputes the feed-forward layer of every layer;",
        ["remove the key, or set what to full"],
    ),
    (
        [*FROM_CHECKPOINT, "--student.recompute.what=mlp"],
        {"student": ModelShape(4, 64, 8, 160, 1000, family="gpt_neox")},
        "--student.recompute.what: mlp: gpt_neox has linear biases;",
        ["set it to full", "(llama, mistral, qwen2, qwen3)"],
    ),
    (
        ["--profile.steps=[12, 10]"],
        {},
        "--profile.steps: [12, 10] ends before it starts;",
        ["use [10, 12]"],
    ),
    (
        ["--profile.steps=[9, 12]", "--train.steps=10"],
        {},
        "--profile.steps: [9, 12]: the run has train.steps 10;",
        ["for example [7, 10]"],
    ),
    (
        ["--profile.steps=[1, 2]", "--profile.ranks=[0, 8]"],
        {},
        "--profile.ranks: 8 is not a rank of this job;",
        ["valid values: 0 to 7"],
    ),
    (
        ["--profile.steps=[1, 2]", "--teacher.placement=disjoint", "--teacher.ranks=4"],
        {},
        "--profile.steps: torch's profiler crashes beside a disjoint teacher;",
        ["set teacher.placement to colocated", "or remove the section profile"],
    ),
    (
        ["--track.mlflow.experiment=capgap"],
        {},
        "--track.mlflow.experiment: mlflow is not installed;",
        ["run pip install -e '.[track]'", "or remove the section track.mlflow"],
    ),
]


@pytest.mark.parametrize("overrides, arguments, start, words", ONE_PROBLEM)
def test_one_mistake_is_one_sentence(problems_of, overrides, arguments, start, words):
    (problem,) = problems_of(*overrides, **arguments)
    assert problem.startswith(start)
    assert all(word in problem for word in words), problem


def test_every_check_finds_one_of_the_mistakes(problems_of, monkeypatch):
    unheard = set(checks.CHECKS)
    for overrides, arguments, _, _ in ONE_PROBLEM:
        for row in tuple(unheard):
            with monkeypatch.context() as patch:
                patch.setattr(checks, "CHECKS", (row,))
                if problems_of(*overrides, **arguments):
                    unheard.discard(row)
    assert not unheard


RIGHT = [
    ([], {}),
    ([], {"teacher": ModelShape(8, 96, 8, 256, 1008)}),
    ([], {"world": 4096}),
    (["--precision.fp8.recipe=tensorwise", "--precision.compute=bf16"], {"capability": (9, 0)}),
    (["--student.precision.fp8.recipe=delayed", "--precision.engine=transformer_engine"], {"capability": (8, 9)}),
    (["--student.precision.fp8={recipe: tensorwise, first_last_layers_bf16: 1}"], {}),
    ([*FROM_CHECKPOINT], {"student": STUDENT}),
    (["--student.layout.virtual_pipeline=2"], {}),
    (["--student.recompute={what: full, every: 2}"], {}),
    (["--student.recompute={what: full, layers: 1}", "--student.layout.virtual_pipeline=2"], {}),
    (["--student.recompute={what: mlp}"], {}),
    (
        [*FROM_CHECKPOINT, *NO_TEACHER, "--student.recompute={what: mlp}"],
        {"stage": "evaluate", "student": ModelShape(4, 64, 8, 160, 1000, family="gpt_neox"), "teacher": None},
    ),
    (["--teacher.layout={tensor: 2, pipeline: 2, sequence: true}", "--teacher.micro_batch=8"], {}),
    (["--train.global_batch=null", "--teacher.micro_batch=1"], {}),
    (["--teacher.layout={pipeline: 8}"], {}),
    (
        ["--teacher.layout={tensor: 4, sequence: true}", "--objective.matching=[{student_layer: 1, teacher_layer: 8}]"],
        {},
    ),
    (["--teacher.placement=disjoint", "--teacher.ranks=4", "--teacher.layout={pipeline: 4}", "--teacher.ahead=3"], {}),
    (["--teacher.placement=disjoint", "--teacher.ranks=2", "--teacher.layout={tensor: 2}"], {"world": 6}),
    (["--student.model.head_dim=16", "--student.model.hidden=100"], {}),
    (["--data.train_weights=[3, 1]", "--optimizer.min_lr=1e-3", "--objective.cross_entropy_weight=0"], {}),
    (["--teacher=null", "--objective.temperature=1.0"], {"stage": "adapt", "teacher": None}),
    (
        ["--teacher=null", "--objective={}", "--student.layout={}"],
        {"stage": "evaluate", "teacher": None, "world": 1},
    ),
    (
        [*FROM_CHECKPOINT, "--finetune.patience=2", "--train.eval_every=5", "--train.steps=null"],
        {"stage": "finetune", "student": STUDENT},
    ),
    ([*FROM_CHECKPOINT, *NO_TEACHER], {"stage": "finetune", "student": STUDENT, "teacher": None}),
]


@pytest.mark.parametrize("overrides, arguments", RIGHT)
def test_nothing_to_say_about_a_right_run(problems_of, overrides, arguments):
    if arguments.get("world") == 4096:
        overrides = [*overrides, "--train.global_batch=2048"]
    assert problems_of(*overrides, **arguments) == []


def test_all_problems_at_once(problems_of):
    problems = problems_of(
        "--student.layout.tensor=3",
        "--student.layout.context=2",
        "--data.sequence_length=31",
        "--optimizer.min_lr=1",
        world=7,
        teacher=ModelShape(9, 96, 8, 256, 999),
    )
    starts = [
        "distill.yaml:10: student.layout: tensor 3 * ",
        "--student.layout.tensor: 3 does not divide student.model.heads 8 and student.model.kv_heads 4 and ",
        "--student.layout.tensor: 3 does not divide heads 8 of runs/large and ffn 256 of runs/large; ",
        "distill.yaml:12: student.layout.pipeline: 2 ",
        "--data.sequence_length: 31 ",
        "--optimizer.min_lr: 1.0 ",
    ]
    assert len(problems) == len(starts)
    assert all(problem.startswith(start) for problem, start in zip(problems, starts, strict=True)), problems


def test_a_default_that_clashes_is_named_as_default():
    config = Config(
        "r",
        StudentConfig(model=STUDENT, layout=Layout()),
        DataConfig("t", ("a",)),
        train=TrainConfig(steps=1, global_batch=1),
    )
    with pytest.raises(ConfigError, match=r"^train.global_batch \(the default\): 1 is not a multiple"):
        checks.check(LoadedConfig(config, {}), "adapt", 2, STUDENT, None)


def test_derived_numbers():
    layout = Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True)
    config = Config(
        "r",
        StudentConfig(model=STUDENT, layout=layout),
        DataConfig("t"),
        train=TrainConfig(global_batch=24, micro_batch=3),
    )
    assert derived.ranks_per_model(layout) == 4
    assert derived.data_parallel(layout, 16) == 4
    assert derived.global_batch(config, layout, 16) == 24
    assert derived.num_microbatches(config, layout, 16) == 2
    config = Config("r", config.student, DataConfig("t"), train=TrainConfig(micro_batch=3), teacher=TeacherConfig("c"))
    assert derived.global_batch(config, layout, 16) == 12
    assert derived.num_microbatches(config, layout, 16) == 1
    assert derived.teacher_layout(config) == Layout(tensor=2, pipeline=2, sequence=True)
    assert derived.teacher_micro_batch(config) == 3


def test_a_tensor_size_that_is_offered_suits_every_model_that_is_cut_so(problems_of):
    """Of the student's own 1, 2 or 4 the teacher would refuse 4."""
    teacher = ModelShape(8, 80, 10, 250, 1000)
    words = ["--student.layout.tensor=3", "--student.layout.sequence=false"]
    both = problems_of(*words, world=6, teacher=teacher)
    assert len(both) == 2 and all("; valid values: 1 or 2" in text for text in both), both
    alone = problems_of(*words, "--teacher.layout.tensor=1", "--teacher.layout.pipeline=2", world=6, teacher=teacher)
    assert "; valid values: 1, 2 or 4" in alone[0]
