"""Made-up records of laws whose truth is known."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_capgap.law.records import Record

Loss = Callable[[float, float], float]
STUDENTS = (1e6, 2e6, 4e6, 8e6)
TEACHERS = (1.5e6, 2.5e6, 4e6, 6.5e6, 1.1e7, 1.8e7, 3e7, 5e7, 8e7)


def record(**changes: Any) -> Record:
    """A sound record."""
    values = {
        "student_params": 1_000_000,
        "teacher_params": 2_500_000,
        "student_params_total": 1_500_000,
        "teacher_params_total": 3_300_000,
        "family": "llama",
        "tokens": 5_000_000,
        "seed": 1,
        "init": "random",
        "valid_loss": 3.25,
        "objective": "0.5 forward_kl + 0.5 cross_entropy",
        "flops": 1e14,
        "config_hash": "abc",
        "teacher_tokens": 10_000_000,
        "valid_tokens": 1000,
        "tokenizer": "spm",
    }
    return Record(**{**values, **changes})


def draw(
    loss: Loss,
    random: np.random.Generator,
    noise: float,
    students: Sequence[float] = STUDENTS,
    teachers: Sequence[float] = TEACHERS,
    seeds: Sequence[int] = (1, 2),
    **changes: Any,
) -> list[Record]:
    """Records of every student with every teacher larger than itself; a seed shifts its student's whole curve, too."""
    found = []
    for student in students:
        for seed in seeds:
            shift = 0.02 * random.standard_normal()
            for teacher in teachers:
                if teacher <= student:
                    continue
                sizes = {"student_params": int(student), "teacher_params": int(teacher)}
                totals = {f"{name}_total": int(size * 1.3) for name, size in sizes.items()}
                value = loss(student, teacher) + shift + noise * random.standard_normal()
                flops = (6 * student + 2 * teacher) * 5e6
                found.append(record(**sizes, **totals, seed=seed, valid_loss=value, flops=flops, **changes))
    return found


def exact(student: float, teacher: float, k: float = 2.5) -> float:
    """A parabola around k times the student."""
    return 3.0 - 0.2 * np.log(student / 1e6) + 0.05 * np.log(teacher / (k * student)) ** 2


def no_optimum(student: float, teacher: float) -> float:
    """Every larger teacher is better, by less and less."""
    return 2.5 - 0.2 * np.log(student / 1e6) + 3.0 * (teacher / 1e6) ** -0.4


def supervised(size: float, tokens: float) -> float:
    """Busbridge et al. 2025: cross-entropy of a model trained without a teacher."""
    return 1.220 + (3355 / size**0.408 + 18186 / tokens**0.431) ** 0.452


def apple(student: float, teacher: float, student_tokens: float = 3e11, teacher_tokens: float = 3e11) -> float:
    """Busbridge et al. 2025, equation 8: cross-entropy of a distilled student. The teacher enters by its own alone."""
    taught, alone = supervised(teacher, teacher_tokens), supervised(student, student_tokens)
    capacity = (1 + (taught / (alone * 1.315)) ** (1 / 0.090)) ** (-522.6 * 0.090)
    return taught + taught**-2.549 * capacity * (2243 / student**0.321 + 24181 / student_tokens**0.637) ** 0.764


def lowest(loss: Loss, student: float, teachers: Sequence[float]) -> float:
    """The size of the best teacher, on a fine grid over the range of `teachers`."""
    fine = np.geomspace(min(teachers), max(teachers), 20001)
    return float(fine[np.argmin([loss(student, size) for size in fine])])


def save(records: Sequence[Record], path: Path) -> str:
    path.write_text("".join(each.line() for each in records))
    return str(path)


def save_raw(lines: Sequence[dict[str, Any]], path: Path) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def asymmetric(student: float, teacher: float, k: float = 2.5) -> float:
    """Steep below its optimum at k times the student, gentle above."""
    distance = np.log(teacher / (k * student))
    return 3.0 - 0.2 * np.log(student / 1e6) + 0.04 * (np.exp(-1.5 * distance) + 1.5 * distance - 1)


def flat(student: float, teacher: float) -> float:
    """All teachers are alike."""
    return 3.0 - 0.2 * np.log(student / 1e6)


def pilot(student: float, teacher: float) -> float:
    """The committed pilot of examples/law_sweep without its teachers' luck: the smallest teacher is the best of all
    but the largest students. A least-squares fit of five numbers to its records."""
    size, ratio = np.log(student / 1e6), np.log(teacher / student)
    return 4.3269 - 0.0693 * size - 0.008 * ratio + 0.002 * ratio**2 - 0.026 * size * ratio
