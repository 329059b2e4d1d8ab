"""A run under a changed configuration: whether it is valid, what memory it needs, how long its steps take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config import derived
from megatron_capgap.config.loader import LoadedConfig
from megatron_capgap.config.schema import Config, ModelShape
from megatron_capgap.config.validation import checks
from megatron_capgap.models import memory
from megatron_capgap.planning import step_time
from megatron_capgap.planning.gpus import GIB, USABLE, Gpu
from megatron_capgap.planning.step_time import StepTime


@dataclass(frozen=True)
class Case:
    """A run on `world` GPUs."""

    loaded: LoadedConfig
    stage: str
    world: int
    student: ModelShape
    teacher: ModelShape | None
    student_of: Callable[[LoadedConfig], ModelShape]
    """Shape of the student under another configuration; raises ConfigError."""
    gpu: Gpu
    utilisation: float

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.loaded.config

    @property
    def trained(self) -> ModelShape:
        """The model that computes in the student's layout: in prune the teacher."""
        if self.stage != "prune":
            return self.student
        assert self.teacher is not None
        return self.teacher

    @property
    def taught(self) -> ModelShape | None:
        """The teacher, if it runs beside the student."""
        return self.teacher if derived.teacher_runs(self.config, self.stage) else None

    def problems(self) -> list[str]:
        """Violations of the constraints that a run has."""
        try:
            student = self.student_of(self.loaded)
            checks.check(self.loaded, self.stage, self.world, student, self.teacher, self.gpu.capability)
        except ConfigError as error:
            return list(error.problems)
        return []

    def changed(self, config: Config) -> Case:
        """The same run under another configuration."""
        return replace(self, loaded=replace(self.loaded, config=config))

    def memory(self) -> int:
        """Bytes on the fullest rank, the teacher's own ranks included."""
        need = memory.estimate(self.config, self.stage, self.student, self.teacher, self.world, on_cpu=False).total
        if self.taught is not None and derived.student_world(self.config, self.world) < self.world:
            need = max(need, memory.estimate_teacher(self.config, self.student, self.taught, self.world).total)
        return need

    @property
    def limit(self) -> int:
        """Usable bytes of a GPU."""
        return int(self.gpu.gib * USABLE * GIB)

    def step(self) -> StepTime:
        """Predicted time of a step."""
        ranks = derived.student_world(self.config, self.world)
        rates = (self.gpu, self.utilisation)
        student = step_time.student_time(self.config, self.stage, self.trained, self.taught, ranks, *rates)
        if self.taught is None:
            return student
        teacher = step_time.teacher_time(self.config, self.taught, self.world, *rates)
        return step_time.together(student, teacher, disjoint=ranks < self.world)

    @property
    def steps(self) -> int | None:
        """Steps of the run; None if unknown."""
        if self.config.prune is not None and self.stage == "prune":
            return self.config.prune.batches
        return self.config.train.steps if self.stage != "evaluate" else self.config.train.eval_batches
