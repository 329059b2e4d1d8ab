"""The law through the students' optima: T = k S, T = k S + b and T = c S^g, with intervals.

Every form is a linear regression with relative errors, so that large students do not dominate small ones:

    proportional   log T - log S = log k
    affine         T / S         = k + b / S
    power          log T         = log c + g log S

An optimum deviates from the law by the noise of its seeds (variance v_i, from the bootstrap of its curve) and by a
random effect of the student (variance tau^2, the same for all, by the method of Paule and Mandel). A parametric
bootstrap draws both, and also the size of the students' scatter about the law with its n - p degrees of freedom, as in
the intervals of Hartung and Knapp. Resampling students instead would give intervals that are far too short for the
three to six students of a pilot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from megatron_capgap.law.cells import Array
from megatron_capgap.law.curves import DRAWS, LEVEL, Curve, Optimum

MILLION = 1e6
PAPER = (2.498, -11.498 * MILLION)
"""k and b of the paper's T = k S + b, in parameters."""


@dataclass(frozen=True)
class Form:
    """One shape of the law as a linear regression of z on columns of a design."""

    name: str
    symbols: tuple[str, ...]
    design: Callable[[Array], Array]
    """Student sizes `[n]` -> design matrix `[n, p]`."""
    to_z: Callable[[Array, Array], Array]
    """Student and teacher sizes `[n]` -> z."""
    to_teacher: Callable[[Array, Array], Array]
    """Student sizes and z -> teacher sizes."""
    slope: Callable[[Array, Array], Array]
    """dz / dlogT at student and teacher sizes: converts an optimum's variance to that of z."""
    plain: float | None
    """Value of its last parameter at which it reduces to T = k S; None for T = k S itself."""
    public: Callable[[Array], Array]
    """Coefficients `[..., p]` -> the parameters named by `symbols`."""

    @property
    def size(self) -> int:
        """Number of its parameters."""
        return len(self.symbols)


def _ones(students: Array) -> Array:
    return np.ones((len(students), 1))


def _exp(x: Array) -> Array:
    """exp without overflow: intervals from two students exceed the range of floats."""
    return np.exp(np.clip(x, -600, 600))


FORMS = (
    Form(
        "proportional",
        ("k",),
        design=_ones,
        to_z=lambda s, t: np.log(t / s),
        to_teacher=lambda s, z: s * _exp(z),
        slope=lambda s, t: np.ones_like(t),
        plain=None,
        public=_exp,
    ),
    Form(
        "affine",
        ("k", "b"),
        design=lambda s: np.stack([np.ones_like(s), MILLION / s], axis=1),
        to_z=lambda s, t: t / s,
        # The line may cross zero; a teacher of 1/1000 of the student represents "none".
        to_teacher=lambda s, z: s * np.maximum(z, 1e-3),
        slope=lambda s, t: t / s,
        plain=0.0,
        public=lambda c: c * np.array([1.0, MILLION]),
    ),
    Form(
        "power",
        ("c", "g"),
        design=lambda s: np.stack([np.ones_like(s), np.log(s)], axis=1),
        to_z=lambda s, t: np.log(t),
        to_teacher=lambda s, z: _exp(z),
        slope=lambda s, t: np.ones_like(t),
        plain=1.0,
        public=lambda c: np.stack([_exp(c[..., 0]), c[..., 1]], axis=-1),
    ),
)


@dataclass(frozen=True)
class Law:
    """A fitted form."""

    form: Form
    students: Array
    """Sizes that it was fitted to `[n]`, ascending."""
    coefficients: Array
    """`[p]`."""
    draws: Array | None
    """Bootstrap draws of the coefficients `[DRAWS, p]`; None if their uncertainty cannot be estimated."""
    scatter: Array
    """Standard deviation of a new student's z about the law `[DRAWS]`, excluding the noise of its seeds."""
    r2: float | None
    """Share of the variance of the optima, in parameters, that the law explains; None for a single student."""
    leave_one_out: float | None
    """Mean relative error when each student is predicted from the others; None for too few students."""
    holdout: float | None
    """Mean relative error when the larger half of the students is predicted from the smaller; None likewise."""

    def values(self) -> dict[str, float]:
        """Its parameters by name."""
        return dict(zip(self.form.symbols, self.form.public(self.coefficients).tolist(), strict=True))

    def intervals(self) -> dict[str, tuple[float, float]] | None:
        """Their intervals by name."""
        if self.draws is None:
            return None
        low, high = _interval(self.form.public(self.draws))
        return dict(zip(self.form.symbols, zip(low.tolist(), high.tolist(), strict=True), strict=True))

    def teacher(self, students: Array) -> Array:
        """Best teachers for student sizes `[n]`."""
        return self.form.to_teacher(students, self.form.design(students) @ self.coefficients)

    def teacher_draws(self, student: float, random: np.random.Generator | None = None) -> Array | None:
        """Draws of one student's best teacher `[DRAWS]`.

        Args:
            student: its size.
            random: draws a new student's own deviation from the law; None omits it and draws the law only.
        """
        if self.draws is None:
            return None
        z = self.draws @ self.form.design(np.array([student]))[0]
        if random is not None:
            z = z + self.scatter * random.standard_normal(DRAWS)
        return self.form.to_teacher(np.full(DRAWS, student), z)


def fit(form: Form, students: Array, teachers: Array, variances: Array, random: np.random.Generator) -> Law:
    """Fits one form.

    Args:
        form: a row of `FORMS`.
        students: sizes `[n]`, n at least form.size.
        teachers: the sizes of their best teachers `[n]`.
        variances: of the logarithms of the teachers' sizes `[n]`; 0 if unknown.
        random: source of the bootstrap.
    """
    design, z = form.design(students), form.to_z(students, teachers)
    noise = variances * form.slope(students, teachers) ** 2
    coefficients, covariance, tau2 = _regress(design, z, noise)
    residuals = z - design @ coefficients
    freedom = len(z) - form.size
    draws = None
    scatter: Array = np.zeros(DRAWS)
    if freedom > 0:
        weights = 1 / _floored(noise + tau2, z)
        inflation = np.sum(weights * residuals**2) / random.chisquare(freedom, DRAWS)
        scatter = np.sqrt(tau2 * freedom / random.chisquare(freedom, DRAWS))
    else:
        inflation = np.ones(DRAWS)
    if freedom > 0 or noise.all():
        steps = random.standard_normal((DRAWS, form.size)) @ np.linalg.cholesky(covariance).T
        draws = coefficients + steps * np.sqrt(inflation)[:, None]
    fitted = form.to_teacher(students, design @ coefficients)
    total = np.sum((teachers - teachers.mean()) ** 2)
    order = np.argsort(students)
    half = len(students) // 2 + len(students) % 2
    folds = [np.delete(order, number) for number in range(len(order))]
    return Law(
        form=form,
        students=students[order],
        coefficients=coefficients,
        draws=draws,
        scatter=scatter,
        r2=float(1 - np.sum((teachers - fitted) ** 2) / total) if total > 0 else None,
        leave_one_out=_error(form, students, teachers, noise, folds),
        holdout=_error(form, students, teachers, noise, [order[:half]]),
    )


def laws(optima: Sequence[tuple[Curve, Optimum]], random: np.random.Generator) -> dict[str, Law]:
    """Fits every form for which there are enough students with an optimum, by name."""
    used = [(curve.student, found) for curve, found in optima if found.teacher is not None]
    if not used:
        return {}
    students = np.array([student for student, _ in used])
    teachers = np.array([found.teacher for _, found in used], dtype=np.float64)
    variances = _variances([found for _, found in used])
    enough = [form for form in FORMS if len(used) >= form.size]
    return {form.name: fit(form, students, teachers, variances, random) for form in enough}


def _variances(optima: Sequence[Optimum]) -> Array:
    """Variances of the logarithms of the optima `[n]`, from the pooled noise of all curves: with few residuals one
    curve's own estimate, and so its weight in the law, may be wrong by a factor of two."""
    freedom = sum(found.freedom for found in optima)
    pooled = sum(found.noise * found.freedom for found in optima) / max(freedom, 1)
    scaled = np.array([found.variance * pooled / found.noise if found.noise else 0.0 for found in optima])
    # A curve of one seed and three teachers has no variance of its own; it gets the largest of the others.
    return np.where(scaled > 0, scaled, scaled.max())


def paper_reading(optima: Sequence[tuple[Curve, Optimum]]) -> dict[str, float] | None:
    """T = k S + b by the paper's method: ordinary least squares through the best teachers on the grid.

    Returns:
        k, b, r2 and the number of students; None for fewer than two. Students whose best teacher is at an end of the
        grid are left out.
    """
    points = [(curve.student, found.best) for curve, found in optima if len(curve.teachers) > 2 and not found.censored]
    if len(points) < 2:
        return None
    students, teachers = np.array(points, dtype=np.float64).T
    k, b = np.polyfit(students, teachers, 1).tolist()
    total = float(np.sum((teachers - teachers.mean()) ** 2))
    left = float(np.sum((teachers - k * students - b) ** 2))
    return {"k": k, "b": b, "r2": 1 - left / total if total else 1.0, "students": len(points)}


def choose(fitted: dict[str, Law]) -> Law | None:
    """T = k S, unless another form predicts students from each other better, and the interval of its second parameter
    excludes the value at which it reduces to T = k S."""
    if not fitted:
        return None
    chosen = fitted["proportional"]
    for law in fitted.values():
        if law.leave_one_out is None or chosen.leave_one_out is None or (intervals := law.intervals()) is None:
            continue
        low, high = intervals.get(law.form.symbols[-1], (0.0, 0.0))
        surely = law.form.plain is not None and not low <= law.form.plain <= high
        if surely and law.leave_one_out < chosen.leave_one_out:
            chosen = law
    return chosen


def _error(form: Form, students: Array, teachers: Array, noise: Array, folds: Sequence[np.ndarray]) -> float | None:
    """Mean relative error at the students outside each fold, predicted from those inside; None if folds are small."""
    errors: list[float] = []
    for inside in folds:
        outside = np.setdiff1d(np.arange(len(students)), inside)
        if len(inside) < form.size or not len(outside):
            return None
        design, z = form.design(students[inside]), form.to_z(students[inside], teachers[inside])
        coefficients, _, _ = _regress(design, z, noise[inside])
        predicted = form.to_teacher(students[outside], form.design(students[outside]) @ coefficients)
        errors += np.abs(predicted / teachers[outside] - 1).tolist()
    return float(np.mean(errors))


def _regress(design: Array, z: Array, noise: Array) -> tuple[Array, Array, float]:
    """Weighted least squares with weights 1 / (noise + tau^2).

    Returns:
        (coefficients `[p]`, their covariance `[p, p]`, tau^2).
    """

    def solve(tau2: float) -> tuple[Array, Array, float]:
        root = 1 / np.sqrt(_floored(noise + tau2, z))
        weighted, target = design * root[:, None], z * root
        inverse = np.linalg.pinv(weighted)
        coefficients = inverse @ target
        return coefficients, inverse @ inverse.T, float(np.sum((target - weighted @ coefficients) ** 2))

    freedom, tau2 = len(z) - design.shape[1], 0.0
    if freedom > 0 and solve(0.0)[2] > freedom:
        # The weighted sum of squares decreases with tau^2; the estimate is where it equals the degrees of freedom.
        enough = 2 * float(np.var(z)) * len(z) + 1e-12
        tau2 = optimize.brentq(lambda tau2: solve(tau2)[2] - freedom, 0.0, enough, xtol=1e-9 * enough)
    coefficients, covariance, _ = solve(tau2)
    return coefficients, covariance, tau2


def _floored(variance: Array, z: Array) -> Array:
    """Positive variances, also for optima that are exact or have no seeds to estimate them from."""
    return np.maximum(variance, 1e-14 * max(1.0, float(np.max(np.abs(z))) ** 2))


def _interval(draws: Array) -> tuple[Array, Array]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high
