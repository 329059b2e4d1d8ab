"""What the memory estimate adds for matched layers, for logits, and for saving while training goes on."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_capgap.config.derived import loss_chunk_tokens
from megatron_capgap.config.schema import (
    FP8,
    Config,
    DataConfig,
    LayerPair,
    Layout,
    ModelShape,
    ObjectiveConfig,
    Precision,
    StudentConfig,
    TeacherConfig,
)
from megatron_capgap.config.training import CheckpointConfig, TrainConfig
from megatron_capgap.models.memory import Memory, estimate, estimate_teacher
from megatron_capgap.models.size import padded_vocab, parameters

STUDENT = ModelShape(layers=4, hidden=64, heads=8, ffn=160, vocab=1000)
TEACHER = ModelShape(layers=8, hidden=96, heads=8, ffn=256, vocab=1000)
CONFIG = Config(
    run_dir="run",
    student=StudentConfig(model=STUDENT),
    teacher=TeacherConfig(checkpoint="large"),
    data=DataConfig(tokenizer="tokenizer.model", sequence_length=32),
    train=TrainConfig(steps=1, global_batch=8, micro_batch=2),
)
A_LAYER = 8 * 32 * 96 * 4  # of a global batch on one rank
A_PROJECTION = 64 * 96


def with_pairs(*pairs: tuple[int, int], layout: Layout, student: ModelShape = STUDENT) -> Memory:
    objective = replace(CONFIG.objective, matching=tuple(LayerPair(*pair) for pair in pairs))
    config = replace(CONFIG, objective=objective, student=StudentConfig(model=student, layout=layout))
    world = layout.tensor * layout.pipeline
    return estimate(config, "distill", student, TEACHER, world, on_cpu=True)


@pytest.mark.parametrize(
    ("layout", "pairs", "layers", "projections"),
    [
        (Layout(), [(1, 2), (2, 2)], 1, 2),
        (Layout(tensor=2, sequence=True), [(1, 2), (2, 3)], 1, 2),  # half of two
        (Layout(pipeline=2), [(1, 2), (3, 6), (4, 8)], 2, 2),  # the last stage is the fullest
        (Layout(pipeline=2, virtual_pipeline=2), [(1, 2), (2, 6)], 1, 1),
    ],
)
def test_matched_layers_are_counted(
    layout: Layout, pairs: list[tuple[int, int]], layers: int, projections: int
) -> None:
    without, found = with_pairs(layout=layout), with_pairs(*pairs, layout=layout)
    assert found.teacher_hidden - without.teacher_hidden == layers * A_LAYER
    assert found.weights - without.weights == found.gradients - without.gradients == projections * A_PROJECTION * 4
    assert found.optimizer - without.optimizer == projections * A_PROJECTION * 8
    assert found.activations == without.activations


def test_equal_widths_need_no_projection() -> None:
    wide = replace(STUDENT, hidden=96)
    assert (
        with_pairs((1, 2), layout=Layout(), student=wide).weights == with_pairs(layout=Layout(), student=wide).weights
    )


@pytest.mark.parametrize(
    ("divergence", "temperature", "weight", "tensor", "tokens", "matrices"),
    [
        ("forward_kl", 1.0, 0.5, 2, 192, 2),
        ("forward_kl", 2.0, 0.5, 2, 192, 3),
        ("forward_kl", 2.0, 0.0, 2, 192, 1),
        ("jsd", 1.0, 0.5, 1, 192, 2),
        ("jsd", 2.0, 0.5, 2, 384, 3),
    ],
)
def test_logits_are_counted(
    divergence: str, temperature: float, weight: float, tensor: int, tokens: int, matrices: int
) -> None:
    """Of the student, of the teacher, and at a temperature the student's once more."""
    objective = ObjectiveConfig(divergence, temperature, weight)
    student = StudentConfig(model=STUDENT, layout=Layout(tensor=tensor))
    data = replace(CONFIG.data, sequence_length=512)
    found = estimate(
        replace(CONFIG, objective=objective, student=student, data=data),
        "distill",
        STUDENT,
        TEACHER,
        tensor,
        on_cpu=True,
    )
    columns = padded_vocab(1000, tensor) // tensor
    assert found.loss == 4 * (matrices * tokens * columns + 64 * columns + 2 * 512 * 64)


@pytest.mark.parametrize(
    ("divergence", "temperature", "tensor", "vocab", "tokens"),
    [
        ("forward_kl", 2.0, 1, 128256, 2048),
        ("forward_kl", 1.0, 2, 128256, 4096),
        ("forward_kl", 1.0, 8, 128256, 8192),
        ("forward_kl", 1.0, 8, 1000, 8192),
        ("jsd", 1.0, 2, 128256, 2 * 4096),
    ],
)
def test_chunks_of_a_gpu_fill_a_budget(
    divergence: str, temperature: float, tensor: int, vocab: int, tokens: int
) -> None:
    """In bf16, and without a buffer for the head's gradient."""
    student, layout = replace(STUDENT, vocab=vocab), Layout(tensor=tensor)
    precision = Precision(compute="bf16")
    config = replace(
        CONFIG,
        objective=ObjectiveConfig(divergence, temperature),
        student=StudentConfig(model=student, layout=layout, precision=precision),
        data=replace(CONFIG.data, sequence_length=8192),
    )
    found = estimate(config, "distill", student, TEACHER, tensor, on_cpu=False)
    columns = padded_vocab(vocab, tensor) // tensor
    assert found.loss == max(2 * 2 * tokens * columns, 2 * 64 * columns) + 2 * 2 * 8192 * 64
    assert 2 * loss_chunk_tokens(False, 2 * columns) * 2 * columns <= max(1 << 30, 2 * 2 * 2048 * columns)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_layers_in_fp8_keep_their_inputs_and_weights_in_bytes(recipe: Any) -> None:
    """Of each layer: two norms' outputs, the activation's, and under delayed scaling the attention's once more."""
    shape, tokens, layers = replace(STUDENT, layers=4, ffn=160), 2 * 32, 2
    weights = layers * (3 * 64 + 64 + 3 * 160) * 64
    found = {}
    for name, fp8 in {
        "bf16": None,
        "cast": FP8(recipe, first_last_layers_bf16=1),
        "held": FP8(recipe, first_last_layers_bf16=1, param_gather=True),
    }.items():
        student = StudentConfig(model=shape, precision=Precision(compute="bf16", fp8=fp8))
        found[name] = estimate(replace(CONFIG, student=student), "adapt", shape, None, 1, on_cpu=False)
    saved = tokens * layers * ((64 + 64 + 160) * (2 - 1) - (64 if recipe == "delayed" else 0))
    assert found["bf16"].activations - found["cast"].activations == saved
    assert found["cast"].weights == found["bf16"].weights
    assert found["cast"].weights - found["held"].weights == 2 * weights
    assert found["cast"].fp8_copies == found["held"].fp8_copies == 2 * weights
    assert found["held"].activations == found["cast"].activations


def test_weights_in_fp8_are_counted_where_they_are() -> None:
    """Of eight layers on four stages the first two and the last two stay in bf16: the stages in between have FP8."""
    shape, held = replace(STUDENT, layers=8, ffn=160), FP8("tensorwise", first_last_layers_bf16=2, param_gather=True)
    a_layer, ends, width = (3 * 64 + 64 + 3 * 160) * 64, parameters(shape), 2
    precision, layout = Precision(compute="bf16", fp8=held), Layout(pipeline=4)
    config = replace(CONFIG, student=StudentConfig(model=shape, precision=precision, layout=layout))
    found = estimate(config, "evaluate", shape, None, 4, on_cpu=False)
    # The fullest stage is one of the ends, with the embedding or the LM head.
    assert found.weights >= width * 2 * a_layer and found.fp8_copies == found.until_cast == 0
    one = estimate(
        replace(config, student=replace(config.student, layout=Layout())), "evaluate", shape, None, 1, on_cpu=False
    )
    assert (one.weights, one.fp8_copies) == (width * (ends - 4 * a_layer), 4 * a_layer)


def test_weights_in_fp8_are_loaded_in_bf16() -> None:
    """A model that is only run takes more while it is loaded than ever after."""
    shape, held = replace(STUDENT, layers=4, ffn=160), FP8("tensorwise", param_gather=True)
    weights = 4 * (3 * 64 + 64 + 3 * 160) * 64
    student = StudentConfig(model=shape, precision=Precision(compute="bf16", fp8=held))
    found = estimate(replace(CONFIG, student=student), "evaluate", shape, None, 1, on_cpu=False)
    assert found.until_cast == weights
    small = replace(found, activations=0, loss=0)
    assert small.total == 2 * parameters(shape) == small.weights + small.fp8_copies + weights
    large = replace(found, activations=10 * weights)
    assert large.total == found.weights + found.fp8_copies + 10 * weights + found.loss
    trained = estimate(replace(CONFIG, student=student), "adapt", shape, None, 1, on_cpu=False)
    assert trained.until_cast == 0
    teacher = replace(CONFIG.teacher, precision=student.precision, layout=Layout(), placement="disjoint", ranks=1)
    config = replace(CONFIG, student=StudentConfig(model=STUDENT), teacher=teacher)
    alone = estimate_teacher(config, STUDENT, shape, 2)
    assert alone.until_cast == weights and alone.total >= alone.teacher_weights + weights


def test_saving_beside_the_training_takes_a_copy_in_host_memory() -> None:
    config = replace(CONFIG, checkpoint=CheckpointConfig(every=1, async_save=True))
    for on_cpu in (True, False):
        beside, waits = (estimate(one, "distill", STUDENT, TEACHER, 1, on_cpu=on_cpu).total for one in (config, CONFIG))
        assert beside - waits == (12 * parameters(STUDENT) if on_cpu else 0)
