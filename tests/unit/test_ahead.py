"""How far a teacher on its own ranks goes ahead: told by a diary of what it did and what it waited for."""

from dataclasses import dataclass

import pytest

from megatron_capgap.distillation.disjoint import run_teacher_ahead


@dataclass
class EventLog:
    """Stands for the teacher and the student; remembers what the teacher did."""

    signals: dict[int, int]
    """The signal that a step's agreement brings, where there is one."""

    def __post_init__(self) -> None:
        self.lines: list[str] = []
        self.agreed = 0

    def teach(self, step: int) -> "Entry":
        self.lines.append(f"teach {step}")
        return Entry(self, step, "taken")

    def agree(self) -> "Entry":
        self.agreed += 1
        return Entry(self, self.agreed - 1, "done")


@dataclass
class Entry:
    """A transfer or an agreement."""

    diary: EventLog
    step: int
    what: str

    def finish(self) -> None:
        self.diary.lines.append(f"{self.what} {self.step}")

    def wait(self) -> int:
        self.finish()
        return self.diary.signals.get(self.step, 0)


def test_one_batch_ahead() -> None:
    diary = EventLog({})
    assert run_teacher_ahead(range(4), 1, diary.teach, diary.agree) == 0
    assert diary.lines[:8] == ["teach 0", "taken 0", "teach 1", "done 0", "taken 1", "teach 2", "done 1", "taken 2"]
    assert diary.lines[8:] == ["teach 3", "done 2", "done 3", "taken 3"]


@pytest.mark.parametrize("ahead", [1, 2, 3, 9])
def test_never_further_ahead_than_said(ahead: int) -> None:
    diary = EventLog({})
    run_teacher_ahead(range(8), ahead, diary.teach, diary.agree)
    for step in range(8):
        before = diary.lines[: diary.lines.index(f"teach {step}")]
        assert [line for line in before if line.startswith("teach")] == [f"teach {k}" for k in range(step)]
        assert [line for line in before if line.startswith("taken")] == [f"taken {k}" for k in range(step - ahead + 1)]
        assert [line for line in before if line.startswith("done")] == [f"done {k}" for k in range(step - ahead)]
    assert [line for line in diary.lines if line.startswith("done")] == [f"done {k}" for k in range(8)]


def test_a_signal_ends_it_at_once() -> None:
    diary = EventLog({2: 15})
    assert run_teacher_ahead(range(8), 2, diary.teach, diary.agree) == 15
    assert "teach 4" in diary.lines and "teach 5" not in diary.lines
    assert diary.lines[diary.lines.index("done 2") :] == ["done 2", "taken 3", "taken 4", "done 3", "done 4"]
    late = EventLog({7: 10})
    assert run_teacher_ahead(range(8), 3, late.teach, late.agree) == 10


def test_a_run_goes_on_where_it_stopped() -> None:
    diary = EventLog({})
    run_teacher_ahead(range(5, 7), 1, diary.teach, diary.agree)
    assert [line for line in diary.lines if line.startswith("teach")] == ["teach 5", "teach 6"]
