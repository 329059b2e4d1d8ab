"""The plan of the hand-off: every rank gets what it needs, once, and nothing moves that need not."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_capgap.config import derived
from megatron_capgap.config.schema import (
    Config,
    DataConfig,
    LayerPair,
    Layout,
    ModelShape,
    ObjectiveConfig,
    StudentConfig,
    TeacherConfig,
)
from megatron_capgap.config.training import TrainConfig
from megatron_capgap.distillation import transfer_plan
from megatron_capgap.distillation.transfer_plan import FINAL_HIDDEN, ModelPlacement, RankSlice, RowRange, StageRoute
from tests.support.processes import ROOT
from tools import draw_layouts

LENGTH = 24  # divisible by every tensor-parallel size below
WORLD = 8

Cells = dict[int, set[tuple[int, int]]]
"""(sample, row) by rank."""


def layouts() -> st.SearchStrategy[Layout]:
    """Layouts of 8 ranks."""
    sizes = [(t, p, c) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) for c in (1, 2, 4) if WORLD % (t * p * c) == 0]
    cuts = [
        Layout(tensor=t, pipeline=p, context=c, sequence=s)
        for t, p, c in sizes
        for s in (False, True)
        if t > 1 or not s
    ]
    return st.sampled_from([cut for cut in cuts if LENGTH % derived.length_unit(cut) == 0])


def configuration(student: Layout, teacher: Layout, *, micro_batch: int = 2, ranks: int = 0) -> Config:
    """16 samples of `LENGTH` tokens; `ranks` of the teacher's own."""
    apart = {"placement": "disjoint", "ranks": ranks} if ranks else {}
    return Config(
        "run",
        StudentConfig(layout=student),
        DataConfig("tokenizer", sequence_length=LENGTH),
        teacher=TeacherConfig("teacher", layout=teacher, micro_batch=1, **apart),
        train=TrainConfig(global_batch=16, micro_batch=micro_batch),
    )


def cells(slabs: list[RankSlice]) -> Cells:
    """What slabs hold, written out."""
    return {
        slab.rank: {(k, row) for k in slab.samples for span in slab.spans for row in range(*span)} for slab in slabs
    }


def last_stages(teacher: ModelPlacement, student: ModelPlacement) -> tuple[list[RankSlice], list[RankSlice]]:
    return teacher.rank_slices(teacher.layout.pipeline - 1), student.rank_slices(student.layout.pipeline - 1)


@given(student=layouts(), teacher=layouts(), ranks=st.sampled_from([0, 8]), micro_batch=st.sampled_from([1, 2]))
def test_what_is_needed_comes_once_and_nothing_else_moves(
    student: Layout, teacher: Layout, ranks: int, micro_batch: int
) -> None:
    config = configuration(student, teacher, micro_batch=micro_batch, ranks=ranks)
    held, needed = last_stages(*transfer_plan.model_placements(config, WORLD + ranks))
    have, want = cells(held), cells(needed)
    got: Cells = {rank: set() for rank in want}
    moved = 0
    for piece in transfer_plan.row_ranges(held, needed):
        rows = {(piece.sample, row) for row in range(piece.start, piece.stop)}
        assert rows <= have[piece.source], "a rank gives what it has"
        assert not rows & got[piece.target], "nothing comes twice"
        got[piece.target] |= rows
        moved += len(rows) * (piece.source != piece.target)
    assert got == want
    assert moved == sum(len(rows - have.get(rank, set())) for rank, rows in want.items()), "the lower bound"


@given(cut=layouts(), micro_batch=st.sampled_from([1, 2]))
def test_in_one_layout_nothing_moves(cut: Layout, micro_batch: int) -> None:
    held, needed = last_stages(*transfer_plan.model_placements(configuration(cut, cut, micro_batch=micro_batch), WORLD))
    assert all(piece.source == piece.target for piece in transfer_plan.row_ranges(held, needed))


@given(student=layouts(), teacher=layouts())
def test_every_sample_has_one_copy_of_each_model(student: Layout, teacher: Layout) -> None:
    for side in transfer_plan.model_placements(configuration(student, teacher, micro_batch=1), WORLD):
        assert sorted(k for samples in side.samples for k in samples) == list(range(16))
        assert len({len(samples) for samples in side.samples}) == 1


def test_copies_of_the_teacher_share_the_giving() -> None:
    """Four tensor-parallel ranks hold the same rows; a student of four copies on other ranks takes a quarter each."""
    config = configuration(Layout(), Layout(tensor=4), ranks=4)
    held, needed = last_stages(*transfer_plan.model_placements(config, 8))
    given_rows = {slab.rank: 0 for slab in held}
    for piece in transfer_plan.row_ranges(held, needed):
        given_rows[piece.source] += piece.rows
    assert set(given_rows.values()) == {16 * LENGTH // 4}


def test_the_slabs_of_a_stage() -> None:
    cut = Layout(tensor=2, pipeline=2, sequence=True)
    side = ModelPlacement(cut, 4, ((0, 2), (1, 3)), LENGTH)
    assert side.rank_slices(1) == [
        RankSlice(8, (0, 2), ((0, 12),)),
        RankSlice(9, (0, 2), ((12, 24),)),
        RankSlice(10, (1, 3), ((0, 12),)),
        RankSlice(11, (1, 3), ((12, 24),)),
    ]
    whole = ModelPlacement(Layout(tensor=2), 0, ((1, 0),), LENGTH)
    assert whole.rank_slices(0) == [RankSlice(0, (1, 0), ((0, 24),)), RankSlice(1, (1, 0), ((0, 24),))]


def test_pieces_by_hand() -> None:
    """A teacher cut along the sequence on ranks 0 and 1; rank 1 needs everything, rank 2 the middle."""
    held = [RankSlice(0, (7,), ((0, 4),)), RankSlice(1, (7,), ((4, 8),))]
    needed = [RankSlice(1, (7,), ((0, 8),)), RankSlice(2, (7,), ((2, 6),))]
    assert transfer_plan.row_ranges(held, needed) == [
        RowRange(7, 0, 4, 0, 1),
        RowRange(7, 4, 8, 1, 1),
        RowRange(7, 2, 4, 0, 2),
        RowRange(7, 4, 6, 1, 2),
    ]


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_sees_its_own_part(rank: int) -> None:
    teacher = ModelPlacement(Layout(tensor=2, pipeline=2), 0, ((0, 1),), LENGTH)
    student = ModelPlacement(Layout(pipeline=4), 0, ((0, 1),), LENGTH)
    routes = [StageRoute(FINAL_HIDDEN, 1, (3,)), StageRoute(3, 0, (1, 3))]
    final, layer = transfer_plan.streams(teacher, student, routes, rank)
    assert (final.held is not None) == (rank >= 2) and (final.needed is not None) == (rank == 3)
    assert (layer.held is not None) == (rank < 2) and (layer.needed is not None) == (rank in (1, 3))
    both = [*final.row_ranges, *layer.row_ranges]
    assert all(rank in (piece.source, piece.target) for piece in both)
    assert final.row_ranges == () if rank < 2 else True


def test_routes_of_matched_layers() -> None:
    """Layers by stages: the teacher's 0 0 0 0 1 1 1 1, the student's 0 1 0 1."""
    pairs = (LayerPair(4, 1), LayerPair(1, 8), LayerPair(2, 8), LayerPair(3, 8))
    config = Config(
        "run",
        StudentConfig(layout=Layout(pipeline=2, virtual_pipeline=2)),
        DataConfig("tokenizer"),
        teacher=TeacherConfig("teacher"),
        objective=ObjectiveConfig(matching=pairs),
    )
    shapes = (ModelShape(layers=layers, hidden=8, heads=2, ffn=8, vocab=8) for layers in (8, 4))
    found = transfer_plan.routes(config, *shapes)
    assert found == [StageRoute(FINAL_HIDDEN, 1, (1,)), StageRoute(1, 0, (1,)), StageRoute(8, 1, (0, 1))]
    assert all(a.key < b.key for a, b in pairwise(found))


def test_the_picture_is_of_this_plan() -> None:
    assert (ROOT / "docs" / "teacher_layouts.svg").read_text() == draw_layouts.picture()
