"""Which runs to make next, so that the recommendation improves most for each operation.

The worth of a run is how much it lowers the expected regret of the recommendation. Before it, the teacher with the
least expected loss is recommended; its loss would change the expectations, and with them perhaps the teacher. So

    gain = mean over losses of the run (expected loss of the teacher recommended before it
                                        - expected loss of the teacher recommended after it)

where both are expected after the run. Its loss is simulated from the posterior: draws of the six scales, and
for each of them joint draws of all runs that could be made. What is expected after it is exact for each draw of the
scales, and these are weighted anew by how well they foretold the loss. Runs are taken one by one, the largest gain for
each operation first, each on top of those taken before, while the budget lasts.

A new seed shifts a student's whole curve by what is not known, so its first run alone tells nothing: it comes with a
second one. A new training of a teacher is paid once, with the first run that it is for; what cutting a student out of
it costs is left out. The way is greedy: of two runs that tell something only together, and are no step here, neither is
seen.
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
"""Draws of the scales, and simulated outcomes of all runs."""
AGAIN = 2
"""So many further seeds of a student, and trainings of a teacher, can be proposed."""
LEAST = 1e-5
"""Nats a token. A run that is expected to gain less is not proposed."""


@dataclass(frozen=True)
class Teacher:
    """A teacher that can be trained."""

    name: str
    size: float
    """Parameters as the data count them."""
    total: float
    """All parameters."""


@dataclass(frozen=True)
class Run:
    """A distillation that could be made."""

    student: float
    """Parameters."""
    teacher: Teacher
    training: int
    """Number of the training: of those of the data, or beyond them for a new one."""
    teacher_seed: int | None
    """Of a training of the data; None for a new one, or where the records do not tell."""
    curve: int
    seed: int
    flops: float
    """Operations of distilling alone."""


@dataclass(frozen=True)
class Step:
    """Runs that are proposed together, and what they are worth."""

    runs: tuple[Run, ...]
    trained: tuple[int, ...]
    """Numbers of the teachers' trainings that they need first."""
    flops: float
    """Operations of all of it."""
    gain: float
    """By how much it lowers the expected regret, on top of the steps before, nats a token."""


@dataclass(frozen=True)
class Plan:
    """What to run next."""

    budget: float
    regret: float
    """Expected regret of the recommendation now, mean over the students that it is for, nats a token."""
    steps: tuple[Step, ...]
    considered: int
    """Steps that were weighed in the first round."""
    known: int
    """Trainings of teachers that are there; numbers from here on are new ones."""

    @property
    def flops(self) -> float:
        """Operations of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def then(self) -> float:
        """The expected regret with all steps."""
        return max(self.regret - sum(step.gain for step in self.steps), 0.0)


def plan(
    process: Process,
    records: Sequence[Record],
    count: str,
    targets: Mapping[float, Sequence[float]],
    teachers: Sequence[Teacher],
    budget: float,
    teacher_tokens: float | None = None,
    simulations: int = SIMULATIONS,
) -> Plan:
    """The steps, the most worth for each operation first.

    Args:
        process: fitted to the records.
        records: under one set of conditions.
        count: how parameters are counted, one of `records.COUNTS`.
        targets: for every student that a teacher is looked for, the parameters of those among which it is chosen.
        teachers: further ones that could be trained, beside those of the records.
        budget: operations.
        teacher_tokens: that new teachers are trained on; None for what the records say.
        simulations: number of simulated outcomes.

    Raises:
        LawError: nothing tells on how many tokens teachers are trained.
    """
    options = _Options(process, records, count, teachers, teacher_tokens)
    belief = _Belief.begin(process, targets, options.runs, simulations)
    regret, taken, steps = belief.regret, set[int](), list[Step]()
    considered = None
    while True:
        offered = [(each, options.price(each, taken)) for each in options.offers(taken)]
        considered = len(offered) if considered is None else considered
        spent = sum(step.flops for step in steps)
        worth = [
            (belief.gain(each) / price, each, price) for each, price in offered if spent + price <= budget * (1 + 1e-9)
        ]
        worth = [each for each in worth if each[0] * each[2] >= LEAST]
        if not worth:
            return Plan(budget, regret, tuple(steps), considered, options.known)
        rate, best, price = max(worth, key=lambda each: each[0])
        steps.append(Step(tuple(options.runs[n] for n in best), options.unpaid(best, taken), price, rate * price))
        for number in best:
            belief = belief.told(number)
        taken |= set(best)


class _Options:
    """All runs that could be made, and which of them are offered when."""

    def __init__(
        self,
        process: Process,
        records: Sequence[Record],
        count: str,
        teachers: Sequence[Teacher],
        teacher_tokens: float | None,
    ) -> None:
        self._process, self._records = process, records
        self._tokens = records[0].tokens
        there = trainings(records, count)
        self.known = len(there)
        self._curves = int(process.cells.curve.max()) + 1
        self._anchors: dict[int, int] = {}
        self._teacher_flops: dict[int, float] = {}
        self.runs: list[Run] = []
        new = self._new_trainings(there, teachers, teacher_tokens, count)
        for student in process.cells.students():
            self._of_student(student, there, new, count)

    def offers(self, taken: set[int]) -> Iterator[tuple[int, ...]]:
        """Steps, as numbers of runs: single ones, two of a new seed, and of new trainings: one for all students, one of
        each size for a student, and for all of them; a few runs may tell nothing where many do."""
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

    def unpaid(self, numbers: Sequence[int], taken: set[int]) -> tuple[int, ...]:
        """The trainings of teachers that these runs are the first to need."""
        paid = {self.runs[n].training for n in taken}
        wanted = sorted({self.runs[n].training for n in numbers})
        return tuple(training for training in wanted if training >= self.known and training not in paid)

    def price(self, numbers: Sequence[int], taken: set[int]) -> float:
        """Operations of these runs, with the teachers that they need first."""
        trained = sum(self._teacher_flops[training] for training in self.unpaid(numbers, taken))
        return trained + sum(self.runs[n].flops for n in numbers)

    def _follows(self, training: int) -> bool:
        """Whether it is a second new training of its teacher, which is as good as the first."""
        return training >= self.known and (training - self.known) % AGAIN > 0

    def _later(self, curve: int) -> bool:
        return (curve - self._curves) % AGAIN > 0

    def _new_trainings(
        self, there: Sequence[Training], teachers: Sequence[Teacher], tokens: float | None, count: str
    ) -> list[tuple[int, Teacher]]:
        """Number and teacher of each training that could be added."""
        totals = {record.sizes(count)[1]: record.sizes("total")[1] for record in self._records}
        known = [Teacher(short(size), size, totals[size]) for size in sorted({each.size for each in there})]
        far = [each for each in teachers if all(abs(np.log(each.size / one.size)) >= SAME_SIZE for one in known)]
        told = [each.tokens for each in there if each.tokens]
        found: list[tuple[int, Teacher]] = []
        for teacher in [*known, *far]:
            own = [each.tokens for each in there if each.tokens and each.size == teacher.size]
            on = tokens or (float(np.median(own or told)) if told else None)
            if on is None:
                raise LawError(
                    "--next: the records have no teacher_tokens, so that the price of another training of a teacher is "
                    "not known; give --teacher-tokens N"
                )
            for _ in range(AGAIN):
                number = self.known + len(found)
                self._teacher_flops[number] = cost.training_flops(teacher.total, on)
                found.append((number, teacher))
        return found

    def _of_student(
        self, student: float, there: Sequence[Training], new: Sequence[tuple[int, Teacher]], count: str
    ) -> None:
        """Adds the runs of one student: cells that are missing, those of a new seed, those of a new training."""
        cells = self._process.cells
        mine = cells.student == student
        own = [record for record, here in zip(self._records, mine, strict=True) if here]
        total = float(np.mean([record.sizes("total")[0] for record in own]))
        seeds = dict(sorted(zip((each.seed for each in own), cells.curve[mine].tolist(), strict=True)))
        done = set(zip(cells.curve[mine].tolist(), cells.training[mine].tolist(), strict=True))
        totals = {record.sizes(count)[1]: record.sizes("total")[1] for record in self._records}
        low, high = self._process.d.min() - SAME_SIZE, self._process.d.max() + SAME_SIZE

        def add(teacher: Teacher, training: int, teacher_seed: int | None, curve: int, seed: int) -> int:
            flops = cost.distill_flops(total, teacher.total, self._tokens)
            self.runs.append(Run(student, teacher, training, teacher_seed, curve, seed, flops))
            return len(self.runs) - 1

        reached = [(n, each) for n, each in enumerate(there) if low <= np.log(each.size / student) <= high]
        fresh = self._curves + AGAIN * self._process.cells.students().index(student)
        middle = float(np.median(cells.teacher[mine]))
        for number, each in reached:
            teacher = Teacher(short(each.size), each.size, totals[each.size])
            for seed, curve in seeds.items():
                if (curve, number) not in done:
                    add(teacher, number, each.seed, curve, seed)
            for further in range(AGAIN):
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
    """What is expected in each simulation, after the runs that have been told."""

    mean: Array
    """Of the points that are chosen among, then of the runs, for each draw of the scales `[scales, simulations, n]`."""
    spread: Array
    """Their covariance `[scales, n, n]`."""
    log: Array
    """Logarithm of the likelihood of what was told `[scales, simulations]`."""
    losses: Array
    """Simulated, of all runs `[simulations, runs]`."""
    slices: tuple[slice, ...]
    """Of the points of each student that a teacher is looked for."""
    regret: float
    """Expected regret before anything was told."""

    @property
    def points(self) -> int:
        """Number of the points that are chosen among."""
        return self.slices[-1].stop

    @staticmethod
    def begin(
        process: Process, targets: Mapping[float, Sequence[float]], runs: Sequence[Run], simulations: int
    ) -> _Belief:
        """Before any of the runs is told.

        Args:
            process: the model.
            targets: teachers to choose among, parameters, for each student.
            runs: that could be made.
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
        drawn = [mean + x @ _root(spread).T for x, (mean, spread) in zip(normal, moments, strict=True)]
        outcome = np.concatenate(drawn)
        mean, spread = (np.array(part) for part in zip(*moments, strict=True))
        lost = []
        for student, ratios in curves:
            drawn_curves = process.curves(student, ratios, DRAWS)
            lost.append(drawn_curves[:, drawn_curves.mean(axis=0).argmin()] - drawn_curves.min(axis=1))
        log = np.zeros((len(chosen), len(outcome)))
        everywhere = np.repeat(mean[:, None], len(outcome), axis=1)
        return _Belief(everywhere, spread, log, outcome[:, ends[-1] :], slices, float(np.mean(lost)))

    def told(self, run: int) -> _Belief:
        """With one more loss, each simulation's own."""
        column = self.points + run
        variance = self.spread[:, column, column]
        missed = self.losses[:, run] - self.mean[:, :, column]
        by = self.spread[:, :, column] / variance[:, None]
        mean = self.mean + missed[:, :, None] * by[:, None]
        spread = self.spread - by[:, :, None] * self.spread[:, None, column]
        log = self.log - 0.5 * np.log(variance)[:, None] - 0.5 * missed**2 / variance[:, None]
        return _Belief(mean, spread, log, self.losses, self.slices, self.regret)

    def gain(self, runs: Sequence[int]) -> float:
        """By how much these runs would lower the expected regret, nats a token."""
        kept = [*range(self.points), *(self.points + run for run in runs)]
        after = _Belief(
            self.mean[:, :, kept],
            self.spread[:, kept][:, :, kept],
            self.log,
            self.losses[:, list(runs)],
            self.slices,
            self.regret,
        )
        for number in range(len(runs)):
            after = after.told(number)
        before, then, rows = self._expected(), after._expected(), np.arange(len(self.losses))
        gains = [
            then[rows, part.start + before[:, part].argmin(axis=1)] - then[:, part].min(axis=1) for part in self.slices
        ]
        return float(np.mean(gains))

    def _expected(self) -> Array:
        """Losses of the points, over the draws of the scales by how well they foretold what was told
        `[simulations, points]`."""
        weights = np.exp(self.log - self.log.max(axis=0))
        weights /= weights.sum(axis=0)
        return np.einsum("ks,ksp->sp", weights, self.mean[:, :, : self.points])


def _root(spread: Array) -> Array:
    """`root_of` by correlations: a new seed's level varies a thousand times as much as a point of a curve, and what is
    added to the variance of one must be nothing to the other."""
    sd = np.sqrt(np.maximum(np.diag(spread), 1e-30))
    return sd[:, None] * root_of(spread / np.outer(sd, sd))
