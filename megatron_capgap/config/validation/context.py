"""What the checks look at, and the words they share."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.config.schema import Config, Layout, ModelShape, Precision

_LARGEST_SUGGESTION = 64


@dataclass(frozen=True)
class ModelContext:
    """The student or the teacher: its shape, its layout, and how messages name them."""

    loaded: LoadedConfig
    role: str
    shape: ModelShape
    layout: Layout
    layout_key: str
    """teacher.layout only where it was given; else the teacher is cut as student.layout says."""
    precision: Precision
    precision_key: str
    """student.precision or teacher.precision only where it was given; else the common precision holds."""
    path: str | None
    """The checkpoint that the shape was read from; None for a model in numbers."""
    section: str = "student.model"
    """Where its numbers were said."""

    def error_prefix(self, name: str) -> str:
        """The beginning of a problem with number `name` of the shape; its value comes next."""
        if self.path is None:
            return f"{self.loaded.location(f'{self.section}.{name}')}: "
        return f"{self.loaded.location(f'{self.role}.checkpoint')}: {self.path}: {name} "

    def number(self, name: str) -> str:
        """How a problem with another key mentions number `name` of the shape."""
        value = getattr(self.shape, name)
        return f"{self.section}.{name} {value}" if self.path is None else f"{name} {value} of {self.path}"


@dataclass(frozen=True)
class ValidationContext:
    """One run as it would be: the configuration, the world and the shapes of its models."""

    loaded: LoadedConfig
    stage: str
    world: int
    models: tuple[ModelContext, ...]
    """The student, then the teacher where there is one."""
    capability: tuple[int, int] | None = None
    """Compute capability of the GPUs, or the supposed one; None where there are none, or nobody knows."""

    @property
    def config(self) -> Config:
        """The validated configuration."""
        return self.loaded.config

    @property
    def layouts(self) -> Iterator[tuple[str, Layout]]:
        """Every layout that was given, with its key."""
        return ((m.layout_key, m.layout) for m in self.models if m.layout_key == f"{m.role}.layout")

    @property
    def dp_size(self) -> int | None:
        """The student's data-parallel size; None where the world does not hold whole students."""
        return _dp_size(self.config.student.layout, derived.student_world(self.config, self.world))

    @property
    def teacher_dp_size(self) -> int | None:
        """The teacher's data-parallel size; None where its ranks do not hold whole teachers. Needs a teacher."""
        return _dp_size(derived.teacher_layout(self.config), len(derived.teacher_ranks(self.config, self.world)))

    def error(self, key: str, text: str) -> str:
        """One finished sentence about `key`."""
        return f"{self.loaded.location(key)}: {text}"


def _dp_size(layout: Layout, ranks: int) -> int | None:
    whole = ranks > 0 and ranks % derived.ranks_per_model(layout) == 0
    return derived.data_parallel(layout, ranks) if whole else None


def build(
    loaded: LoadedConfig,
    stage: str,
    world: int,
    student: ModelShape,
    teacher: ModelShape | None,
    capability: tuple[int, int] | None,
) -> ValidationContext:
    """The case of one run; the arguments are those of `checks.check`."""
    config = loaded.config
    path = None if config.student.model else config.student.checkpoint
    key = "student.precision" if config.student.precision else "precision"
    arithmetic = derived.student_precision(config)
    section = "prune" if stage == "prune" else "student.model"
    models = [
        ModelContext(
            loaded, "student", student, config.student.layout, "student.layout", arithmetic, key, path, section
        )
    ]
    if teacher is not None:
        assert config.teacher is not None
        layout_key = "teacher.layout" if config.teacher.layout else "student.layout"
        key = "teacher.precision" if config.teacher.precision else "precision"
        layout, arithmetic = derived.teacher_layout(config), derived.teacher_precision(config)
        models.append(
            ModelContext(loaded, "teacher", teacher, layout, layout_key, arithmetic, key, config.teacher.checkpoint)
        )
    return ValidationContext(loaded, stage, world, tuple(models), capability)


def divisors(*numbers: int) -> str:
    """The common divisors up to 64, as in `1, 2 or 4`."""
    return _joined_with_or([size for size in range(1, _LARGEST_SUGGESTION + 1) if all(n % size == 0 for n in numbers)])


def multiples(number: int, step: int) -> str:
    """The multiples of `step` just below and above `number`, as in `24 or 32`."""
    below = number // step * step
    return _joined_with_or([multiple for multiple in (below, below + step) if multiple > 0])


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers, as in `1 to 4, 9 or 11 to 12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return _joined_with_or([str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs])


def as_yaml(value: object) -> str:
    """A scalar as the user would write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined_with_or(values: Sequence[object]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
