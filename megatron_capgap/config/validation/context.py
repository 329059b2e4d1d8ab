"""Input of the checks, and shared formatting of their messages."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_capgap.config import derived
from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.config.schema import Config, Layout, ModelShape, Precision

_LARGEST_SUGGESTION = 64


@dataclass(frozen=True)
class CheckedModel:
    """The student or the teacher: shape, layout, precision, and their names in messages."""

    loaded: LoadedConfig
    role: str
    shape: ModelShape
    layout: Layout
    layout_key: str
    """teacher.layout only if it was set; otherwise the teacher has student.layout."""
    precision: Precision
    precision_key: str
    """student.precision or teacher.precision only if it was set; otherwise precision."""
    path: str | None
    """Checkpoint that the shape was read from; None for student.model."""
    section: str = "student.model"
    """Section that sets the shape."""

    def error_prefix(self, name: str) -> str:
        """Prefix of a problem with dimension `name` of the shape; its value follows."""
        if self.path is None:
            return f"{self.loaded.location(f'{self.section}.{name}')}: "
        return f"{self.loaded.location(f'{self.role}.checkpoint')}: {self.path}: {name} "

    def number(self, name: str) -> str:
        """Dimension `name` with its value, as mentioned in a problem with another key."""
        value = getattr(self.shape, name)
        return f"{self.section}.{name} {value}" if self.path is None else f"{name} {value} of {self.path}"


@dataclass(frozen=True)
class ValidationContext:
    """The run to validate: configuration, world size and model shapes."""

    loaded: LoadedConfig
    stage: str
    world: int
    models: tuple[CheckedModel, ...]
    """The student, then the teacher if there is one."""
    capability: tuple[int, int] | None = None
    """Actual or assumed compute capability of the GPUs; None if there are none or it is unknown."""

    @property
    def config(self) -> Config:
        """The validated configuration."""
        return self.loaded.config

    @property
    def layouts(self) -> Iterator[tuple[str, Layout]]:
        """Every layout that was set, with its key."""
        return ((m.layout_key, m.layout) for m in self.models if m.layout_key == f"{m.role}.layout")

    @property
    def dp_size(self) -> int | None:
        """The student's data-parallel size; None if it is not a whole number."""
        return _dp_size(self.config.student.layout, derived.student_world(self.config, self.world))

    @property
    def teacher_dp_size(self) -> int | None:
        """The teacher's data-parallel size; None if it is not a whole number. Requires a teacher."""
        return _dp_size(derived.teacher_layout(self.config), len(derived.teacher_rank_range(self.config, self.world)))

    def error(self, key: str, text: str) -> str:
        """One complete message about `key`."""
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
    """Creates the context of one run; the arguments are those of `checks.check`."""
    config = loaded.config
    path = None if config.student.model else config.student.checkpoint
    key = "student.precision" if config.student.precision else "precision"
    precision = derived.student_precision(config)
    section = "prune" if stage == "prune" else "student.model"
    models = [
        CheckedModel(loaded, "student", student, config.student.layout, "student.layout", precision, key, path, section)
    ]
    if teacher is not None:
        assert config.teacher is not None
        layout_key = "teacher.layout" if config.teacher.layout else "student.layout"
        key = "teacher.precision" if config.teacher.precision else "precision"
        layout, precision = derived.teacher_layout(config), derived.teacher_precision(config)
        path = None if config.teacher.model else config.teacher.checkpoint
        models.append(
            CheckedModel(loaded, "teacher", teacher, layout, layout_key, precision, key, path, "teacher.model")
        )
    return ValidationContext(loaded, stage, world, tuple(models), capability)


def divisors(*numbers: int) -> str:
    """Common divisors up to 64, for example `1, 2 or 4`."""
    return _joined_with_or([size for size in range(1, _LARGEST_SUGGESTION + 1) if all(n % size == 0 for n in numbers)])


def multiples(number: int, step: int) -> str:
    """The multiples of `step` just below and above `number`, for example `24 or 32`."""
    below = number // step * step
    return _joined_with_or([multiple for multiple in (below, below + step) if multiple > 0])


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges, for example `1 to 4, 9 or 11 to 12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return _joined_with_or([str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs])


def as_yaml(value: object) -> str:
    """A scalar in YAML notation."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined_with_or(values: Sequence[object]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
