"""What the memory estimate adds for matched layers, and for saving while training goes on."""

from dataclasses import replace

import pytest

from megatron_capgap.config.schema import (
    Checkpoint,
    Config,
    Data,
    LayerPair,
    Layout,
    ModelShape,
    Student,
    Teacher,
    Train,
)
from megatron_capgap.models.memory import Memory, estimate
from megatron_capgap.models.size import parameters

STUDENT = ModelShape(layers=4, hidden=64, heads=8, ffn=160, vocab=1000)
TEACHER = ModelShape(layers=8, hidden=96, heads=8, ffn=256, vocab=1000)
CONFIG = Config(
    run_dir="run",
    student=Student(model=STUDENT),
    teacher=Teacher(checkpoint="large"),
    data=Data(tokenizer="tokenizer.model", sequence_length=32),
    train=Train(steps=1, global_batch=8, micro_batch=2),
)
A_LAYER = 8 * 32 * 96 * 4  # of a global batch on one rank
A_PROJECTION = 64 * 96


def with_pairs(*pairs: tuple[int, int], layout: Layout, student: ModelShape = STUDENT) -> Memory:
    objective = replace(CONFIG.objective, matching=tuple(LayerPair(*pair) for pair in pairs))
    config = replace(CONFIG, objective=objective, student=Student(model=student, layout=layout))
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


def test_saving_beside_the_training_takes_a_copy_in_host_memory() -> None:
    config = replace(CONFIG, checkpoint=Checkpoint(every=1, async_save=True))
    for on_cpu in (True, False):
        beside, waits = (estimate(one, "distill", STUDENT, TEACHER, 1, on_cpu=on_cpu).total for one in (config, CONFIG))
        assert beside - waits == (12 * parameters(STUDENT) if on_cpu else 0)
