"""A teacher in a layout of its own: losses and gradient norms are those of one rank, and no byte too many moves.

A covering part runs by default; `pytest -m "" tests/distributed/test_teacher_layouts.py` runs every combination.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_capgap.config.schema import Config, DataConfig, Layout, StudentConfig, TeacherConfig
from megatron_capgap.config.training import TrainConfig
from tests.support import dense, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

TOLERANCE = 1e-5

# Of another depth, width and number of heads; both can be cut into four in either way.
STUDENT = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 4, "ffn": 48, "vocab": runs.VOCAB}
TEACHER = {"layers": 8, "hidden": 48, "heads": 8, "kv_heads": 4, "ffn": 80, "vocab": runs.VOCAB}

TEACHERS: dict[str, dict[str, Any]] = {
    "tp4": {"tensor": 4},
    "tp4_sp": {"tensor": 4, "sequence": True},
    "pp4": {"pipeline": 4},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "tp2_dp2": {"tensor": 2},
    "tp2_sp_dp2": {"tensor": 2, "sequence": True},
    "dp4": {},
    "cp4": {"context": 4},
    "cp2_tp2_sp": {"context": 2, "tensor": 2, "sequence": True},
    "cp2_dp2": {"context": 2},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "pp2_vp2_dp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp4_sp": {"tensor": 4, "sequence": True},
    "dp4": {},
    "cp4": {"context": 4},
    "cp2_tp2_sp": {"context": 2, "tensor": 2, "sequence": True},
    "cp2_pp2_vp2": {"context": 2, "pipeline": 2, "virtual_pipeline": 2},
}
COVERING = [
    ("tp4", "dp4"),
    ("tp4_sp", "tp2_pp2"),
    ("pp4", "tp2_pp2"),
    ("pp4", "tp4_sp"),
    ("tp2_pp2", "tp4_sp"),
    ("tp2_dp2", "pp2_vp2_dp2"),
    ("tp2_sp_dp2", "dp4"),
    ("dp4", "pp2_vp2_dp2"),
    ("cp4", "cp2_tp2_sp"),
    ("cp2_dp2", "cp4"),
    ("cp2_tp2_sp", "cp2_pp2_vp2"),
    ("tp2_pp2", "cp2_pp2_vp2"),
]
PAIRS = [
    pytest.param(a, b, marks=() if (a, b) in COVERING else pytest.mark.matrix, id=f"{a}-to-{b}")
    for a in TEACHERS
    for b in STUDENTS
]

Distil = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def teachers(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Trained teachers with tied or untied embeddings, made when they are asked for."""
    folder, done = tmp_path_factory.mktemp("teachers"), {}

    def teacher(tied: bool) -> Path:
        if tied not in done:
            changes = {"train__steps": 25, "optimizer__lr": 1.0e-2, "data__valid": None}
            changes["student__model"] = {**TEACHER, "tied_embeddings": tied}
            done[tied] = runs.train(pool, "adapt", runs.adapt_config(fixtures, folder / f"tied_{tied}", **changes))
        return done[tied]

    return teacher


@pytest.fixture(scope="module")
def distil(
    pool: WorkerPool,
    fixtures: Fixtures,
    teachers: Callable[[bool], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Distil:
    """Distils; gives the lines of metrics.jsonl. A run that was asked for before is not made again."""
    done: dict[str, list[dict[str, Any]]] = {}

    def distil(
        world: int = 1, student: dict[str, Any] | None = None, *, tied: bool = False, **changes: Any
    ) -> list[dict[str, Any]]:
        key = f"{world} {student} {tied} {changes}"
        if key not in done:
            model = {**STUDENT, "tied_embeddings": tied}
            fixed = {"student__model": model, "student__layout": student or {}, "teacher__micro_batch": 1}
            run_dir = tmp_path_factory.mktemp("distil") / "run"
            raw = runs.distill_config(fixtures, run_dir, teachers(tied), **{**fixed, **changes})
            done[key] = runs.metrics(runs.train(pool, "distill", raw, world))
        return done[key]

    return distil


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], where: str) -> None:
    assert [entry["step"] for entry in found] == [1, 2, 3, 4, 4]
    assert found[0]["loss"] > found[3]["loss"], "four steps that learn nothing would agree in any layout"
    for mine, theirs in zip(found, expected, strict=True):
        runs.assert_close(mine, theirs, TOLERANCE, where)


@pytest.mark.parametrize("teacher, student", PAIRS)
def test_four_ranks_colocated(distil: Distil, teacher: str, student: str) -> None:
    found = distil(4, STUDENTS[student], teacher__layout=TEACHERS[teacher])
    assert_same(found, distil(), f"{teacher} to {student}")


@pytest.mark.parametrize("teacher, student", [("pp4", "tp2_pp2"), ("tp4", "tp4_sp"), ("tp2_pp2", "dp4")])
def test_tied_embeddings(distil: Distil, teacher: str, student: str) -> None:
    """A head that lies in the embedding: on another stage, in the same shard, in another shard than is needed."""
    found = distil(4, STUDENTS[student], tied=True, teacher__layout=TEACHERS[teacher])
    assert_same(found, distil(tied=True), f"{teacher} to {student}, tied")


def test_a_tied_teacher_of_an_untied_student(distil: Distil) -> None:
    changes = {"tied": True, "student__model": STUDENT}
    found = distil(4, STUDENTS["tp2_pp2"], teacher__layout=TEACHERS["tp2_dp2"], **changes)
    assert_same(found, distil(**changes), "tied to untied")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_host_memory_teach_the_same(distil: Distil, tied: bool) -> None:
    assert distil(tied=tied, teacher__offload=True) == distil(tied=tied)


def test_a_teacher_in_bf16_teaches_a_student_in_fp32(distil: Distil) -> None:
    """Its own sums round differently in another layout, by 2^-9 of a state; the student's are exact."""
    rounded = {"teacher__precision": {"compute": "bf16"}}
    found = distil(4, STUDENTS["pp2_vp2_dp2"], teacher__layout=TEACHERS["tp4_sp"], **rounded)
    expected, exact = distil(**rounded), distil()
    assert found[0]["cross_entropy"] == pytest.approx(expected[0]["cross_entropy"], rel=TOLERANCE)
    for mine, theirs in zip(found, expected, strict=True):
        runs.assert_close(mine, theirs, 2e-3, "bf16 to fp32")
    assert expected[0]["cross_entropy"] == exact[0]["cross_entropy"]
    assert 1e-6 < abs(expected[0]["divergence"] / exact[0]["divergence"] - 1) < 2e-2


@pytest.mark.parametrize("of_teacher, of_student", [(runs.VOCAB, runs.VOCAB + 3), (runs.VOCAB + 9, runs.VOCAB)])
def test_vocabularies_padded_to_different_sizes(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, of_teacher: int, of_student: int
) -> None:
    """Of one tokenizer: the columns that both models have are compared, as dense models in float64 compare them."""
    shape = {**runs.TEACHER, "vocab": of_teacher, "tied_embeddings": True}
    changes: dict[str, Any] = {"student__model": shape, "train__steps": 2, "data__valid": None}
    teacher = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "teacher", **changes))
    changes["student__model"] = {**runs.STUDENT, "vocab": of_student}
    changes |= {"optimizer__schedule": "constant", "optimizer__epsilon": 1.0e-4}
    for name, (world, layout) in {
        "one": (1, {}),
        "tensor": (2, {"tensor": 2}),
        "pipeline": (2, {"pipeline": 2}),
    }.items():
        raw = runs.distill_config(fixtures, tmp_path / name, teacher, **changes, student__layout=layout)
        found = runs.steps_of(runs.train(pool, "distill", raw, world))
        for mine, theirs in zip(found, dense.steps(pool, "distill", raw, shape), strict=True):
            del mine["lr"]
            runs.assert_close(mine, theirs, 2e-5, name)


@pytest.mark.slow("eight ranks on few cores")
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_eight_ranks(distil: Distil, micro_batch: int) -> None:
    student, teacher = {"tensor": 2, "pipeline": 2, "sequence": True}, {"tensor": 4}
    found = distil(8, student, teacher__layout=teacher, teacher__micro_batch=micro_batch)
    assert_same(found, distil(), "eight ranks")


def configuration(teacher: Layout, student: Layout) -> Config:
    return Config(
        "run",
        StudentConfig(layout=student),
        DataConfig("tokenizer", sequence_length=16),
        teacher=TeacherConfig("teacher", layout=teacher, micro_batch=1),
        train=TrainConfig(global_batch=8, micro_batch=2),
    )


def hand_over(teacher: Layout, student: Layout) -> tuple[int, int, int, int]:
    """Runs in a worker: hands over states that say where they come from, and looks at what arrives.

    Returns:
        Bytes that this rank sent, that it received, that it holds afterwards, and that it needed and did not have.
    """
    import torch.distributed as dist

    from megatron_capgap.distillation import transfer_plan
    from megatron_capgap.distillation.transfer import HiddenStateTransfer, batched_p2p
    from megatron_capgap.distillation.transfer_plan import FINAL_HIDDEN, StageRoute

    width, first_sample, rank = 5, 24, dist.get_rank()
    sides = transfer_plan.model_placements(configuration(teacher, student), dist.get_world_size())
    (stream,) = transfer_plan.streams(
        *sides, [StageRoute(FINAL_HIDDEN, teacher.pipeline - 1, (student.pipeline - 1,))], rank
    )

    def rows(sample: int, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Every number names its sample, row and column."""
        numbers = torch.cat([torch.arange(*span) for span in spans])
        return sample * 1000.0 + numbers[:, None] * 10.0 + torch.arange(width)

    counted = {"isend": 0, "irecv": 0}

    def counting(sends: Any, receives: Any) -> Any:
        counted["isend"] += sum(tensor.numel() * tensor.element_size() for tensor, _ in sends)
        counted["irecv"] += sum(tensor.numel() * tensor.element_size() for tensor, _ in receives)
        return batched_p2p(sends, receives)

    hand_off = HiddenStateTransfer(
        [stream], rank, width=width, dtype=torch.float32, device=torch.device("cpu"), transport=counting
    )
    have, need = stream.held, stream.needed
    held = {k + first_sample: rows(k + first_sample, have.spans) for k in have.samples} if have else {}
    found = hand_off.start({FINAL_HIDDEN: held}, first_sample).wait()[FINAL_HIDDEN]
    wanted = {k + first_sample: rows(k + first_sample, need.spans) for k in need.samples} if need else {}
    assert found.keys() == wanted.keys()
    for sample, states in found.items():
        assert torch.equal(states, wanted[sample]), (sample, states, wanted[sample])
    cells = [
        {(k, row) for k in slab.samples for span in slab.spans for row in range(*span)} if slab else set()
        for slab in (need, have)
    ]
    storages = {states.untyped_storage().data_ptr(): states.untyped_storage().nbytes() for states in found.values()}
    return counted["isend"], counted["irecv"], sum(storages.values()), len(cells[0] - cells[1]) * width * 4


def hand_over_each(teacher: Layout, students: list[Layout]) -> list[tuple[int, int, int, int]]:
    """`hand_over` to one student after the other."""
    return [hand_over(teacher, student) for student in students]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_more_bytes_move_than_must(pool: WorkerPool, teacher: str) -> None:
    """What was really handed to the transport, rank by rank; and no rank holds more than its share."""
    students = [Layout(**layout) for layout in STUDENTS.values()]
    by_rank = pool.run(hand_over_each, Layout(**TEACHERS[teacher]), students, world=4)
    for name, student, ranks in zip(STUDENTS, students, zip(*by_rank, strict=True), strict=True):
        sent, received, held, bound = (sum(column) for column in zip(*ranks, strict=True))
        assert sent == received == bound, name
        assert [rank[1] for rank in ranks] == [rank[3] for rank in ranks], name
        a_sample = 16 * 5 * 4
        copies = 4 // (student.tensor * student.pipeline * student.context)
        share = 8 // copies * a_sample // ((student.tensor if student.sequence else 1) * student.context)
        assert held == share * student.tensor * student.context * copies, name
        assert {rank[2] for rank in ranks} <= {0, share}, name
