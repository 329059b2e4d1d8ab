"""Plans the next runs: those that improve the recommendation most per FLOP.

The gain of a run is the decrease of the recommendation's expected regret. Before the run, the teacher with the least
expected loss is recommended; the run's loss changes the expectations, and so possibly the recommended teacher:

    gain = mean over losses of the run (expected loss of the teacher recommended before it
                                        - expected loss of the teacher recommended after it)

where both expectations are taken after the run. Its loss is simulated from the posterior: draws of the six scales, and
for each of them joint draws of all possible runs. The expectation after a run is exact for each draw of the scales, and
the draws are reweighted by the likelihood of the simulated loss. Runs are selected greedily by gain per FLOP, each
conditional on those selected before, until the budget is spent.

A new seed shifts a student's whole curve by an unknown amount, so its first run alone gives no information; it is
proposed together with a second one. The cost of a new training of a teacher is counted once, with the first run that
needs it; the cost of pruning is neglected. The greedy search misses runs that are informative only together, unless
they form one of the steps considered here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_capgap.law import cost
from megatron_capgap.law.cells import SAME_SIZE, Array, Cells, Training, trainings
from megatron_capgap.law.files import LawError
from megatron_capgap.law.formatting import short
from megatron_capgap.law.gaussian_process import Process, root_of
from megatron_capgap.law.records import Record
from megatron_capgap.law.verdict import DRAWS

SCALES, SIMULATIONS = 20, 400
"""Number of draws of the scales, and of simulated outcomes of all runs."""
MAX_NEW_SEEDS = 2
"""Maximum number of further seeds of a student, and of further trainings of a teacher, that are proposed."""
MIN_GAIN = 1e-5
"""Minimum expected gain of a proposed run, nats per token."""


@dataclass(frozen=True)
class TeacherCandidate:
    """A teacher that can be trained."""

    name: str
    size: float
    """Parameters, counted as in the data."""
    total: float
    """All parameters."""


@dataclass(frozen=True)
class CandidateRun:
    """A distillation that could be made."""

    student: float
    """Parameters."""
    teacher: TeacherCandidate
    training: int
    """Index of the teacher's training: one of the data, or a higher number for a new one."""
    teacher_seed: int | None
    """Seed of a training of the data; None for a new one, or if not recorded."""
    curve: int
    seed: int
    flops: float
    """FLOPs of the distillation only."""


@dataclass(frozen=True)
class Step:
    """Runs that are proposed together, with their cost and gain."""

    runs: tuple[CandidateRun, ...]
    trained: tuple[int, ...]
    """Indices of the teachers' trainings that must be made first."""
    flops: float
    """FLOPs of the step, including new trainings of teachers."""
    gain: float
    """Decrease of the expected regret, in addition to the previous steps, nats per token."""


@dataclass(frozen=True)
class NextRunsPlan:
    """The proposed next runs."""

    budget: float
    regret: float
    """Current expected regret of the recommendation, mean over the target students, nats per token."""
    steps: tuple[Step, ...]
    considered: int
    """Number of steps considered in the first round."""
    known: int
    """Number of existing trainings of teachers; indices from here on are new ones."""

    @property
    def flops(self) -> float:
        """FLOPs of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def regret_after(self) -> float:
        """The expected regret after all steps."""
        return max(self.regret - sum(step.gain for step in self.steps), 0.0)


def propose_runs(
    process: Process,
    records: Sequence[Record],
    count: str,
    targets: Mapping[float, Sequence[float]],
    teachers: Sequence[TeacherCandidate],
    budget: float,
    teacher_tokens: float | None = None,
    simulations: int = SIMULATIONS,
) -> NextRunsPlan:
    """The steps, in descending order of gain per FLOP.

    Args:
        process: fitted to the records.
        records: under one set of conditions.
        count: how parameters are counted, one of `records.COUNTS`.
        targets: for each target student, the parameters of its candidate teachers.
        teachers: teachers that could be trained, in addition to those of the records.
        budget: FLOPs.
        teacher_tokens: training tokens of new teachers; None takes those of the records.
        simulations: number of simulated outcomes.

    Raises:
        LawError: the number of training tokens of teachers is unknown.
    """
    options = _Options(process, records, count, teachers, teacher_tokens)
    belief = _Belief.begin(process, targets, options.runs, simulations)
    regret, taken, steps = belief.regret, set[int](), list[Step]()
    considered = None
    while True:
        offered = [(each, options.price(each, taken)) for each in options.candidate_steps(taken)]
        considered = len(offered) if considered is None else considered
        spent = sum(step.flops for step in steps)
        worth = [
            (belief.gain(each) / price, each, price) for each, price in offered if spent + price <= budget * (1 + 1e-9)
        ]
        worth = [each for each in worth if each[0] * each[2] >= MIN_GAIN]
        if not worth:
            return NextRunsPlan(budget, regret, tuple(steps), considered, options.known)
        rate, best, price = max(worth, key=lambda each: each[0])
        runs = tuple(options.runs[n] for n in best)
        steps.append(Step(runs, options.new_trainings(best, taken), price, rate * price))
        for number in best:
            belief = belief.condition_on(number)
        taken |= set(best)


class _Options:
    """All possible runs, and the steps that are offered in each round."""

    def __init__(
        self,
        process: Process,
        records: Sequence[Record],
        count: str,
        teachers: Sequence[TeacherCandidate],
        teacher_tokens: float | None,
    ) -> None:
        self._process, self._records = process, records
        self._tokens = records[0].tokens
        known_trainings = trainings(records, count)
        self.known = len(known_trainings)
        self._curves = int(process.cells.curve.max()) + 1
        self._anchors: dict[int, int] = {}
        self._teacher_flops: dict[int, float] = {}
        self.runs: list[CandidateRun] = []
        new = self._possible_trainings(known_trainings, teachers, teacher_tokens, count)
        for student in process.cells.students():
            self._of_student(student, known_trainings, new, count)

    def candidate_steps(self, taken: set[int]) -> Iterator[tuple[int, ...]]:
        """Steps, as indices of runs: single runs, two of a new seed, and runs of new trainings: one training for all
        students, one of each size for a student, and one of each size for all students, because a few runs may give no
        information where many do."""
        curves = {self.runs[n].curve for n in taken}
        used = {self.runs[n].training for n in taken}
        whole: dict[tuple[object, ...], list[int]] = {}
        for number, run in enumerate(self.runs):
            if number in taken or (self._follows(run.training) and run.training - 1 not in used):
                continue
            if run.training >= self.known:
                for key in ((run.training,), (run.student, self._follows(run.training)), ()):
                    whole.setdefault(key, []).append(number)
            if run.curve < self._curves or run.curve in curves:
                yield (number,)
            elif number != self._anchors[run.curve] and not (self._later(run.curve) and run.curve - 1 not in curves):
                yield self._anchors[run.curve], number
        yield from dict.fromkeys(tuple(numbers) for numbers in whole.values() if len(numbers) > 1)

    def new_trainings(self, numbers: Sequence[int], taken: set[int]) -> tuple[int, ...]:
        """The trainings of teachers that these runs need and that no earlier step has paid for."""
        paid = {self.runs[n].training for n in taken}
        wanted = sorted({self.runs[n].training for n in numbers})
        return tuple(training for training in wanted if training >= self.known and training not in paid)

    def price(self, numbers: Sequence[int], taken: set[int]) -> float:
        """FLOPs of these runs, including the new trainings of teachers."""
        trained = sum(self._teacher_flops[training] for training in self.new_trainings(numbers, taken))
        return trained + sum(self.runs[n].flops for n in numbers)

    def _follows(self, training: int) -> bool:
        """Whether it is a second new training of its teacher, which is equivalent to the first."""
        return training >= self.known and (training - self.known) % MAX_NEW_SEEDS > 0

    def _later(self, curve: int) -> bool:
        return (curve - self._curves) % MAX_NEW_SEEDS > 0

    def _possible_trainings(
        self,
        known_trainings: Sequence[Training],
        teachers: Sequence[TeacherCandidate],
        tokens: float | None,
        count: str,
    ) -> list[tuple[int, TeacherCandidate]]:
        """Index and teacher of each training that could be added."""
        totals = {record.sizes(count)[1]: record.sizes("total")[1] for record in self._records}
        sizes = sorted({each.size for each in known_trainings})
        known = [TeacherCandidate(short(size), size, totals[size]) for size in sizes]
        others = [each for each in teachers if all(abs(np.log(each.size / one.size)) >= SAME_SIZE for one in known)]
        recorded = [each.tokens for each in known_trainings if each.tokens]
        found: list[tuple[int, TeacherCandidate]] = []
        for teacher in [*known, *others]:
            own = [each.tokens for each in known_trainings if each.tokens and each.size == teacher.size]
            on = tokens or (float(np.median(own or recorded)) if recorded else None)
            if on is None:
                raise LawError(
                    "--next: the records have no teacher_tokens, so the cost of another training of a teacher is "
                    "unknown; give --teacher-tokens N"
                )
            for _ in range(MAX_NEW_SEEDS):
                number = self.known + len(found)
                self._teacher_flops[number] = cost.training_flops(teacher.total, on)
                found.append((number, teacher))
        return found

    def _of_student(
        self,
        student: float,
        known_trainings: Sequence[Training],
        new: Sequence[tuple[int, TeacherCandidate]],
        count: str,
    ) -> None:
        """Adds the runs of one student: missing cells, those of a new seed, those of a new training."""
        cells = self._process.cells
        mine = cells.student == student
        own = [record for record, here in zip(self._records, mine, strict=True) if here]
        total = float(np.mean([record.sizes("total")[0] for record in own]))
        seeds = dict(sorted(zip((each.seed for each in own), cells.curve[mine].tolist(), strict=True)))
        done = set(zip(cells.curve[mine].tolist(), cells.training[mine].tolist(), strict=True))
        totals = {record.sizes(count)[1]: record.sizes("total")[1] for record in self._records}
        low, high = self._process.d.min() - SAME_SIZE, self._process.d.max() + SAME_SIZE

        def add(teacher: TeacherCandidate, training: int, teacher_seed: int | None, curve: int, seed: int) -> int:
            flops = cost.distill_flops(total, teacher.total, self._tokens)
            self.runs.append(CandidateRun(student, teacher, training, teacher_seed, curve, seed, flops))
            return len(self.runs) - 1

        reached = [(n, each) for n, each in enumerate(known_trainings) if low <= np.log(each.size / student) <= high]
        fresh = self._curves + MAX_NEW_SEEDS * self._process.cells.students().index(student)
        middle = float(np.median(cells.teacher[mine]))
        for number, each in reached:
            teacher = TeacherCandidate(short(each.size), each.size, totals[each.size])
            for seed, curve in seeds.items():
                if (curve, number) not in done:
                    add(teacher, number, each.seed, curve, seed)
            for further in range(MAX_NEW_SEEDS):
                column = add(teacher, number, each.seed, fresh + further, max(seeds) + 1 + further)
                anchor = self._anchors.setdefault(fresh + further, column)
                if abs(np.log(each.size / middle)) < abs(np.log(self.runs[anchor].teacher.size / middle)):
                    self._anchors[fresh + further] = column
        first = next(iter(seeds))
        for number, teacher in new:
            if low <= np.log(teacher.size / student) <= high:
                add(teacher, number, None, seeds[first], first)


@dataclass(frozen=True)
class _Belief:
    """Expectations in each simulation, after the runs whose losses have been observed."""

    mean: Array
    """Means of the candidate points, then of the runs, for each draw of the scales `[scales, simulations, n]`."""
    covariance: Array
    """Their covariance `[scales, n, n]`."""
    log: Array
    """Log-likelihood of the observed losses `[scales, simulations]`."""
    losses: Array
    """Simulated losses of all runs `[simulations, runs]`."""
    slices: tuple[slice, ...]
    """Slice of the points of each target student."""
    regret: float
    """Expected regret before any observation."""

    @property
    def points(self) -> int:
        """Number of candidate points."""
        return self.slices[-1].stop

    @staticmethod
    def begin(
        process: Process, targets: Mapping[float, Sequence[float]], runs: Sequence[CandidateRun], simulations: int
    ) -> _Belief:
        """The state before any run is observed.

        Args:
            process: the model.
            targets: parameters of the candidate teachers, for each student.
            runs: all possible runs.
            simulations: number of simulated outcomes.
        """
        curves = [(student, np.log(np.array(sizes) / student)) for student, sizes in targets.items()]
        ends = np.cumsum([0, *(len(ratios) for _, ratios in curves)]).tolist()
        slices = tuple(slice(*pair) for pair in pairwise(ends))
        sizes = np.array([(run.student, run.teacher.size) for run in runs]).T
        numbers = np.array([(run.curve, run.training) for run in runs]).T
        cells = Cells(sizes[0], sizes[1], numbers[0], numbers[1], np.zeros(len(runs)), np.zeros(len(runs)))
        chosen = np.unique(np.linspace(0, len(process.draws) - 1, SCALES).round().astype(int))
        moments = [process.moments(number, curves, cells) for number in chosen.tolist()]
        random = np.random.default_rng(0)
        each = -(-simulations // len(chosen))
        normal = [random.standard_normal((each, ends[-1] + len(runs))) for _ in moments]
        drawn = [mean + x @ _root(covariance).T for x, (mean, covariance) in zip(normal, moments, strict=True)]
        outcome = np.concatenate(drawn)
        mean, covariance = (np.array(part) for part in zip(*moments, strict=True))
        lost = []
        for student, ratios in curves:
            drawn_curves = process.curves(student, ratios, DRAWS)
            lost.append(drawn_curves[:, drawn_curves.mean(axis=0).argmin()] - drawn_curves.min(axis=1))
        log = np.zeros((len(chosen), len(outcome)))
        everywhere = np.repeat(mean[:, None], len(outcome), axis=1)
        return _Belief(everywhere, covariance, log, outcome[:, ends[-1] :], slices, float(np.mean(lost)))

    def condition_on(self, run: int) -> _Belief:
        """The state after observing one more run, with each simulation's own loss."""
        column = self.points + run
        variance = self.covariance[:, column, column]
        missed = self.losses[:, run] - self.mean[:, :, column]
        by = self.covariance[:, :, column] / variance[:, None]
        mean = self.mean + missed[:, :, None] * by[:, None]
        covariance = self.covariance - by[:, :, None] * self.covariance[:, None, column]
        log = self.log - 0.5 * np.log(variance)[:, None] - 0.5 * missed**2 / variance[:, None]
        return _Belief(mean, covariance, log, self.losses, self.slices, self.regret)

    def gain(self, runs: Sequence[int]) -> float:
        """Decrease of the expected regret by these runs, nats per token."""
        kept = [*range(self.points), *(self.points + run for run in runs)]
        after = _Belief(
            self.mean[:, :, kept],
            self.covariance[:, kept][:, :, kept],
            self.log,
            self.losses[:, list(runs)],
            self.slices,
            self.regret,
        )
        for number in range(len(runs)):
            after = after.condition_on(number)
        before, expected_after, rows = self._expected(), after._expected(), np.arange(len(self.losses))
        gains = [
            expected_after[rows, part.start + before[:, part].argmin(axis=1)] - expected_after[:, part].min(axis=1)
            for part in self.slices
        ]
        return float(np.mean(gains))

    def _expected(self) -> Array:
        """Expected losses of the points: mean over the draws of the scales, weighted by the likelihood of the observed
        losses `[simulations, points]`."""
        weights = np.exp(self.log - self.log.max(axis=0))
        weights /= weights.sum(axis=0)
        return np.einsum("ks,ksp->sp", weights, self.mean[:, :, : self.points])


def _root(covariance: Array) -> Array:
    """`root_of` applied to the correlations: a new seed's level varies a thousand times as much as a point of a curve,
    so one value added to both variances would be too large for the latter."""
    sd = np.sqrt(np.maximum(np.diag(covariance), 1e-30))
    return sd[:, None] * root_of(covariance / np.outer(sd, sd))
