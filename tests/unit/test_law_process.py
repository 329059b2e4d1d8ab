"""The model of all cells: against a dense reference, and against truths that are known."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import law as benchmark
from megatron_capgap.law import cells, gaussian_process, verdict
from megatron_capgap.law.cells import Cells
from megatron_capgap.law.gaussian_process import Process
from megatron_capgap.law.records import LawError, Record
from tests.support import law as made


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def arrays(records: list[Record]) -> Cells:
    return cells.cells(records, "non-embedding")


def lucky(records: list[Record], luck: dict[int, float], told: bool) -> list[Record]:
    """Records in which each teacher size adds its luck to all of its students' losses, and to its own."""
    found = []
    for each in records:
        own = luck[each.teacher_params]
        loss = 3.5 - 0.07 * np.log(each.teacher_params / 1e6) + own if told else None
        found.append(replace(each, valid_loss=each.valid_loss + own, teacher_valid_loss=loss))
    return found


def draw_luck(random: np.random.Generator, sd: float) -> dict[int, float]:
    return {int(size): float(sd * random.standard_normal()) for size in made.TEACHERS}


def naive_covariance(found: Cells, scales: list[float], i: int, j: int) -> float:
    """Covariance of the losses of runs i and j without noise, written as the module's docstring says it."""
    shared, length, drift, own, luck, _ = scales
    d1, d2 = (np.log(found.teacher[k] / found.student[k]) for k in (i, j))
    z = np.log(found.student[i]) - np.log(found.student[j])
    near = np.exp(-((d1 - d2) ** 2) / (2 * length**2))
    total = 5.0**2 * (found.curve[i] == found.curve[j]) + 0.1**2 * d1 * d2 + shared**2 * near
    total += drift**2 * np.exp(-(z**2) / (2 * 1.2**2)) * (near + d1 * d2)
    total += own**2 * (found.student[i] == found.student[j]) * (0.05 * near + d1 * d2)
    return total + found.quality[i] * found.quality[j] + luck**2 * (found.training[i] == found.training[j])


def test_likelihood_and_gradient_are_those_of_a_dense_reference() -> None:
    records = lucky(made.draw(made.exact, generator(), 0.003), draw_luck(generator(1), 0.01), told=True)
    found = arrays(records)
    fitted = Process(found, generator())
    h = np.log([0.2, 1.3, 0.02, 0.01, 0.006, 0.004])
    scales, n = np.exp(h).tolist(), len(found)
    matrix = np.array([[naive_covariance(found, scales, i, j) for j in range(n)] for i in range(n)])
    matrix += (scales[-1] ** 2 + gaussian_process.JITTER) * np.eye(n)
    y = found.loss - found.loss.mean()
    prior = [(x - np.log(median)) / sd for x, (median, sd) in zip(h, gaussian_process.PRIOR.values(), strict=True)]
    wanted = 0.5 * y @ np.linalg.inv(matrix) @ y + 0.5 * np.linalg.slogdet(matrix)[1] + 0.5 * np.sum(np.square(prior))
    value, gradient = fitted.objective(h)
    assert value == pytest.approx(wanted, rel=1e-9)
    slopes = [(fitted.objective(h + s)[0] - fitted.objective(h - s)[0]) / 2e-5 for s in 1e-5 * np.eye(len(h))]
    assert gradient == pytest.approx(slopes, rel=1e-4, abs=1e-4)


def test_draws_have_the_mean_and_covariance_of_the_posterior() -> None:
    """With one draw of the scales, curves are Gaussian: conditioned by hand."""
    found = arrays(made.draw(made.exact, generator(), 0.003, students=[1e6, 3e6], teachers=made.TEACHERS[::2]))
    fitted = Process(found, generator())
    fitted.draws, fitted._factors = fitted.draws[:1], fitted._factors[:1]
    scales, new = np.exp(fitted.draws[0]).tolist(), [0.4, 1.0, 2.0]
    n, m, student = len(found), len(new), 2e6
    student_all = np.append(found.student, [student] * m)
    everything = Cells(
        student_all,
        np.append(found.teacher, student * np.exp(new)),
        np.append(found.curve, -np.arange(1, m + 1)),
        np.append(found.training, -np.arange(1, m + 1)),
        np.append(found.loss, np.zeros(m)),
        np.zeros(n + m),
    )
    full = np.array([[naive_covariance(everything, scales, i, j) for j in range(n + m)] for i in range(n + m)])
    full[n:, n:] -= np.eye(m) * (5.0**2 + scales[4] ** 2)  # a curve has no level and no luck
    data = full[:n, :n] + (scales[-1] ** 2 + gaussian_process.JITTER) * np.eye(n)
    solved = np.linalg.solve(data, full[:n, n:])
    mean = solved.T @ (found.loss - found.loss.mean())
    spread = full[n:, n:] - full[n:, :n] @ solved
    drawn = fitted.curves(student, np.array(new), 40_000)
    error = np.sqrt(np.diag(spread) / 40_000)
    assert np.abs(drawn.mean(axis=0) - mean).max() < 5 * error.max()
    assert fitted.mean(student, np.array(new)) == pytest.approx(mean, abs=1e-9)
    assert np.cov(drawn.T) == pytest.approx(spread, abs=0.03 * spread.max())


@pytest.mark.parametrize("told", [False, True])
def test_the_teachers_luck_is_recovered(told: bool) -> None:
    """Without being told it too, up to what a slope in log T explains as well."""
    luck = draw_luck(generator(5), 0.014)
    found = arrays(lucky(made.draw(made.exact, generator(), 0.002), luck, told))
    estimated = Process(found, generator()).teachers()
    sizes = found.teacher[[int(np.argmax(found.training == number)) for number in range(len(estimated))]]
    true = np.array([luck[int(size)] for size in sizes])

    def bent(values: np.ndarray) -> np.ndarray:
        x = np.log(sizes)
        return values - np.polyval(np.polyfit(x, values, 2), x)

    assert np.abs(bent(estimated) - bent(true)).max() < 0.003


def verdicts(records: list[Record]) -> list[str]:
    return [each.verdict for each in verdict.findings(Process(arrays(records), generator()))]


def test_verdicts_on_known_truths() -> None:
    many = {"teachers": np.geomspace(1.2e6, 9e7, 9)}
    assert set(verdicts(made.draw(made.exact, generator(), 0.002, **many))) == {"interior"}
    assert set(verdicts(made.draw(made.no_optimum, generator(), 0.002, **many))) == {"saturating"}
    assert set(verdicts(made.draw(made.flat, generator(), 0.002, **many))) == {"not detected"}
    rising = verdicts(made.draw(lambda s, t: 3 + 0.05 * np.log(t / s), generator(), 0.002, **many))
    assert set(rising) == {"smallest"}


def test_data_without_noise_and_data_that_say_little() -> None:
    """Scales at the edge of what can be inverted, and as few runs as there are."""
    assert set(verdicts(made.draw(made.exact, generator(), 0.0))) == {"interior"}
    for number in (1, 2, 3):
        some = made.draw(made.exact, generator(), 0.002, students=[1e6], teachers=made.TEACHERS[:number], seeds=[1])
        (found,) = verdict.findings(Process(arrays(some), generator()))
        assert found.verdict == "not detected" and np.isfinite(found.curve).all()


def test_gaps_do_not_hide_a_rise() -> None:
    """Most cells are missing, one seed, each teacher under one or two students: the rise of 0.2 nats is still seen."""
    some = made.draw(made.exact, generator(), 0.002, seeds=[1])
    kept = [each for number, each in enumerate(some) if number % 2]
    assert len(kept) < 17
    found = verdict.findings(Process(arrays(kept), generator()))
    assert not any(each.verdict == "saturating" for each in found)
    assert all(each.probabilities["interior"] + each.probabilities["smallest"] > 0.9 for each in found)
    assert all(each.curve[0, -1] - each.curve[1].min() > 0.05 for each in found)


def test_a_teacher_s_luck_is_no_optimum() -> None:
    """Truth without an optimum, teachers as in the pilot: the paper's reading names a law here."""
    random = generator(2)
    students, teachers = np.geomspace(1.1e5, 7.8e5, 4), np.geomspace(2e5, 9.7e6, 8)
    luck = {int(size): float(0.0137 * random.standard_normal()) for size in teachers}
    some = lucky(made.draw(made.pilot, random, 0.002, students, teachers), luck, told=False)
    found = verdict.findings(Process(arrays(some), generator()))
    assert not verdict.is_law(found)
    assert found[0].verdict == "smallest"


@pytest.mark.parametrize(("design", "number"), [((4, 4, 2, 1), 4), ((4, 4, 2, 1), 10), ((3, 5, 1, 3), 7)])
def test_luck_along_a_fall_is_no_curve(design: tuple[int, int, int, int], number: int) -> None:
    """All teachers are alike but for luck, which happens to fall with their size: the posterior gives the fall a
    probability of 0.90 to 0.93."""
    records, _, _ = benchmark.draw(benchmark.Cell("flat", 0.0137, design), number)
    found = verdict.findings(Process(arrays(records), generator(number)))
    assert max(each.probabilities["saturating"] for each in found) > 0.88
    assert {each.verdict for each in found} == {"not detected"}


def test_trainings_of_one_size_are_told_apart() -> None:
    some = made.draw(made.exact, generator(), 0.002)
    two = [
        replace(each, teacher_seed=seed, valid_loss=each.valid_loss + 0.02 * seed) for each in some for seed in (1, 2)
    ]
    found = arrays(two)
    assert len(cells.trainings(two, "non-embedding")) == 2 * len(made.TEACHERS)
    effects = Process(found, generator()).teachers()
    assert np.diff(effects.reshape(-1, 2), axis=1) == pytest.approx(0.02, abs=0.004)
    for name, values in (("teacher_valid_loss", (3.0, 3.01)), ("teacher_tokens", (7, 8))):
        odd = [replace(each, **{name: values[number // 2 % 2]}) for number, each in enumerate(two)]
        with pytest.raises(LawError, match=rf"teacher of 1,500,000 parameters, teacher_seed 1: {name} is {values[0]}"):
            arrays(odd)


def test_evaluations_of_one_teacher_may_differ_slightly() -> None:
    """Without a teacher_seed, too: a teacher that was evaluated anew beside each student is one training."""
    some = made.draw(made.exact, generator(), 0.002)
    again = [replace(each, teacher_valid_loss=3.0 + 0.0001 * number) for number, each in enumerate(some[:9])]
    (first, *_) = cells.trainings(again, "non-embedding")
    assert len(cells.trainings(again, "non-embedding")) == len({each.teacher_params for each in again})
    assert first.loss == pytest.approx(3.0)


def test_own_losses_need_no_trend_over_few_sizes() -> None:
    """Three sizes, two trainings each: a training is compared with the other of its size."""
    some = [
        replace(each, teacher_seed=seed, teacher_valid_loss=3.0 + 0.1 * seed + each.teacher_params * 1e-8)
        for each in made.draw(made.exact, generator(), 0.002, teachers=made.TEACHERS[:3])
        for seed in (1, 2)
    ]
    assert sorted(set(arrays(some).quality.round(6))) == [-0.05, 0.05]


def test_sizes_that_differ_slightly_are_one_student() -> None:
    some = made.draw(made.exact, generator(), 0.002, students=[2e6])
    other = [replace(each, student_params=each.student_params + 20_000 * (each.seed == 2)) for each in some]
    assert arrays(other).students() == pytest.approx([2e6 * 1.01**0.5])
